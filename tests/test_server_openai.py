"""OpenAI's own Python client against a live server: what it parses is what people build on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest

import bitllm
from live_server import LiveServer, live, slow_llm, until

HI: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 9},
                "b": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def client_of(server: LiveServer, key: str = "right") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def llm() -> Iterator[bitllm.LLM]:
    with bitllm.load(threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    options: Any = {"pooling": "mean", "api_keys": ("right",)}
    with live({"demo": bitllm.load(threads=1, kv_tokens=2048)}, **options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI, llm: bitllm.LLM) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HI, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    expected = llm.chat(HI, max_tokens=8, temperature=0, logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [each.logprob for each in choice.logprobs.content] == [
        each.logprob for each in expected.logprobs or ()
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details is not None


def test_streamed_chat(client: openai.OpenAI, llm: bitllm.LLM) -> None:
    expected = llm.chat(HI, max_tokens=12, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=HI,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)


def test_completions(client: openai.OpenAI, llm: bitllm.LLM) -> None:
    prompts = ["The list", "A function"]
    answer = client.completions.create(
        model="demo", prompt=prompts, max_tokens=5, temperature=0, echo=True, logprobs=1
    )
    expected = llm.generate(prompts, max_tokens=5, temperature=0)
    assert [each.text for each in answer.choices] == [
        prompt + each.text for prompt, each in zip(prompts, expected, strict=True)
    ]
    assert answer.choices[0].logprobs is not None
    stream = client.completions.create(
        model="demo", prompt="The", max_tokens=5, stream=True, seed=3
    )
    assert "".join(chunk.choices[0].text for chunk in stream)


def test_asynchronous(server: LiveServer, llm: bitllm.LLM) -> None:
    prompts = [f"The list number {number}" for number in range(8)]

    async def ask() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="right", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=10, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    expected = llm.generate(prompts, max_tokens=10, temperature=0)
    assert asyncio.run(ask()) == [each.text for each in expected]


class Weather(pydantic.BaseModel):
    unit: Literal["C", "F"]
    dry: bool


def test_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=HI, response_format=Weather, max_tokens=60
    )
    found = answer.choices[0].message.parsed
    assert isinstance(found, Weather)
    assert found.unit in ("C", "F")
    with client.chat.completions.stream(
        model="demo", messages=HI, response_format=Weather, max_tokens=60
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Weather)


def test_a_structured_answer_that_is_cut_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="demo", messages=HI, response_format=Weather, max_tokens=3
        )


def test_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=HI, tools=[TOOL], tool_choice="required", max_tokens=100
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    # The answer goes back as the client has it.
    messages = [
        *HI,
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "5"},
    ]
    again = client.chat.completions.create(
        model="demo", messages=messages, tools=[TOOL], tool_choice="none", max_tokens=5
    )
    assert again.choices[0].message.content


def test_streamed_tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo",
        messages=HI,
        tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}],
        tool_choice="required",
        max_tokens=100,
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls or []
    assert set(json.loads(call.function.arguments)) == {"a", "b"}


def test_embeddings(client: openai.OpenAI, llm: bitllm.LLM) -> None:
    texts = ["one text", "another"]
    answer = client.embeddings.create(model="demo", input=texts)  # asks for base64
    rows = np.array([each.embedding for each in answer.data], np.float32)
    np.testing.assert_array_equal(rows, llm.embed(texts, pooling="mean"))
    short = client.embeddings.create(model="demo", input=texts, dimensions=4)
    assert len(short.data[0].embedding) == 4


def test_errors_have_the_types_of_the_client(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=HI, temperature=-1)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    assert "temperature" in wrong.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="hi " * 600)
    assert long.value.code == "context_length_exceeded"
    with client_of(server, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_client_waits_where_it_is_told_to() -> None:
    llm = slow_llm(seconds=0.01)
    with live({"m": llm}, max_requests=1) as server, client_of(server) as client:
        stream = client.completions.create(model="m", prompt="a", max_tokens=150, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="m", prompt="b", max_tokens=1)
        patient = client.with_options(max_retries=5)
        answer = patient.completions.create(model="m", prompt="b", max_tokens=1)
        assert answer.choices[0].text == "a"
        stream.close()


def test_a_client_that_closes_its_stream_frees_the_place() -> None:
    with live({"m": slow_llm(seconds=0.01)}) as server, client_of(server) as client:
        stream = client.chat.completions.create(model="m", messages=HI, max_tokens=900, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        until(server.is_idle, 3.0)


def test_an_error_in_mid_stream_is_raised() -> None:
    def breaks(tokens: list[int]) -> int:
        if len(tokens) > 20:
            raise bitllm.CheckpointError("layer 3 holds no numbers")
        return ord("a")

    llm = slow_llm(seconds=0, next_token=breaks)
    with live({"m": llm}) as server, client_of(server) as client:
        stream = client.chat.completions.create(model="m", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="layer 3 holds no numbers"):
            list(stream)
