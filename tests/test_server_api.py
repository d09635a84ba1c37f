"""The endpoints of the server, over a socket: what they answer, and how they refuse."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

import bitllm
from bitllm.server.endpoints import ENDPOINTS
from live_server import LiveServer, live, saying, slow_llm, until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def llm() -> Iterator[bitllm.LLM]:
    """The demo model, asked without a server."""
    with bitllm.load(threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live({"demo": bitllm.load(threads=1, kv_tokens=2048)}, pooling="mean") as server:
        yield server


def refused(answer: Any, status: int = 400) -> dict[str, Any]:
    """Check that this is an error as OpenAI's clients read it, and return it."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json.values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return dict(error)


def test_health_version_and_models(server: LiveServer) -> None:
    for path in ("/health", "/v1/health"):
        answer = server.get(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})
    assert server.get("/version").json == {"version": bitllm.__version__}
    for path in ("/v1/models", "/models"):
        found = server.get(path).json
        assert found["object"] == "list"
        (card,) = found["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 512)
    assert server.get("/v1/models/demo").json == card
    error = refused(server.get("/v1/models/nobody/nothing"), 404)
    assert error["code"] == "model_not_found"
    assert "nobody/nothing" in error["message"]
    assert "demo" in error["message"]


def test_a_completion_is_what_the_engine_writes(server: LiveServer, llm: bitllm.LLM) -> None:
    answer = server.post(TEXT, {"model": "demo", "prompt": "The list", **GREEDY})
    assert answer.status == 200
    expected = llm.generate("The list", temperature=0, max_tokens=8)
    found = answer.json
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert found["model"] == "demo"
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "text": expected.text,
        "logprobs": None,
        "finish_reason": expected.finish_reason,
    }
    usage = found["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}


def test_a_chat_is_what_the_engine_answers(server: LiveServer, llm: bitllm.LLM) -> None:
    asked = {"seed": 5, "temperature": 0.8, "top_p": 0.9, "n": 2}
    found = server.post(CHAT, {"messages": HI, "max_completion_tokens": 9, **asked}).json
    expected = llm.chat(HI, max_tokens=9, **asked)  # type: ignore[arg-type]
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    assert [each["message"]["content"] for each in found["choices"]] == [
        each.text for each in expected.choices
    ]
    assert [each["index"] for each in found["choices"]] == [0, 1]
    assert {each["message"]["role"] for each in found["choices"]} == {"assistant"}
    assert found["usage"]["completion_tokens"] == sum(
        len(each.token_ids) for each in expected.choices
    )


def test_parts_of_messages_are_joined_and_developers_are_system(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    other = [{"role": "system", "content": "be"}, {"role": "user", "content": "a\nb"}]
    prompts = [server.post("/apply-template", {"messages": m}).json["prompt"] for m in (one, other)]
    assert prompts[0] == prompts[1]
    assert "a\nb" in prompts[0]


def test_unknown_fields_are_ignored_and_null_is_default(server: LiveServer) -> None:
    extra = {"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "new": [1]}
    null = {"stop": None, "stream": None, "logit_bias": None, "response_format": None, "n": None}
    plain = server.post(CHAT, {"messages": HI, **GREEDY}).json
    answer = server.post(CHAT, {"messages": HI, **GREEDY, **extra, **null})
    assert answer.status == 200
    assert answer.json["choices"] == plain["choices"]


def test_prompts_as_texts_ids_and_lists(server: LiveServer, llm: bitllm.LLM) -> None:
    texts = ["The list", "A"]
    ids = [llm.encode(text) for text in texts]
    of_texts = server.post(TEXT, {"prompt": texts, "n": 2, "seed": 1, **GREEDY}).json
    of_ids = server.post(TEXT, {"prompt": ids, "n": 2, "seed": 1, **GREEDY}).json
    assert of_texts["choices"] == of_ids["choices"]
    assert [each["index"] for each in of_ids["choices"]] == [0, 1, 2, 3]
    assert of_ids["usage"]["prompt_tokens"] == sum(map(len, ids))
    single = server.post(TEXT, {"prompt": ids[0], **GREEDY}).json
    assert single["choices"][0]["text"] == of_texts["choices"][0]["text"]


def test_echo_with_logprobs_as_lm_eval_asks(server: LiveServer, llm: bitllm.LLM) -> None:
    prompts = [llm.encode("The list of all"), llm.encode("A function")]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = server.post(TEXT, {"model": "demo", "prompt": prompts, **asked}).json["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        told = choice["logprobs"]
        assert {len(each) for each in told.values()} == {len(prompt) + 1}
        assert told["token_logprobs"][0] is None
        score = llm.score(prompt[:2], prompt[2:])
        assert math.fsum(told["token_logprobs"][2:-1]) == pytest.approx(score.logprob, abs=1e-5)
        greedy = [
            max(likely, key=likely.__getitem__) == token
            for token, likely in zip(told["tokens"][2:-1], told["top_logprobs"][2:-1], strict=True)
        ]
        assert all(greedy) == score.greedy
        assert "".join(told["tokens"]) == choice["text"]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert choice["text"][offset : offset + len(token)] == token


def test_an_echo_can_be_all(server: LiveServer) -> None:
    asked = {"prompt": "The list", "echo": True, "max_tokens": 0}
    (choice,) = server.post(TEXT, asked).json["choices"]
    assert (choice["text"], choice["logprobs"]) == ("The list", None)
    (choice,) = server.post(TEXT, {**asked, "logprobs": 0}).json["choices"]
    told = choice["logprobs"]
    assert told["tokens"] == ["<|begin_of_text|>", "The", " list"]
    assert told["text_offset"] == [0, 0, 3]  # the start token is no part of the text
    assert [len(each) for each in told["top_logprobs"][1:]] == [1, 1]


def test_log_probabilities_of_chats(server: LiveServer, llm: bitllm.LLM) -> None:
    asked = {"logprobs": True, "top_logprobs": 3, **GREEDY}
    (choice,) = server.post(CHAT, {"messages": HI, **asked}).json["choices"]
    told = choice["logprobs"]["content"]
    expected = llm.chat(HI, temperature=0, max_tokens=8, logprobs=3)
    assert expected.logprobs is not None
    assert [each["logprob"] for each in told] == [each.logprob for each in expected.logprobs]
    assert "".join(each["token"] for each in told) == choice["message"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in told).decode() == expected.text
    assert {len(each["top_logprobs"]) for each in told} == {3}
    assert told[0]["top_logprobs"][0]["token"] == told[0]["token"]  # greedy


def test_the_stop_token_is_no_part_of_a_chat() -> None:
    with live({"m": slow_llm(seconds=0, next_token=saying("héllo"))}) as server:
        asked = {"messages": HI, "logprobs": True}
        (choice,) = server.post(CHAT, asked).json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("héllo", "stop")
        told = choice["logprobs"]["content"]
        assert b"".join(bytes(each["bytes"]) for each in told).decode() == "héllo"
        events = server.post(CHAT, {**asked, "stream": True}).events
        deltas = [event["choices"][0] for event in events[:-1]]
        assert "".join(each["delta"].get("content", "") for each in deltas) == "héllo"
        streamed = [e for d in deltas if d["logprobs"] for e in d["logprobs"]["content"]]
        assert streamed == told


def test_stop_strings_seeds_and_bias(server: LiveServer, llm: bitllm.LLM) -> None:
    text = llm.generate("The list", temperature=0, max_tokens=20).text
    stop = text[5:8]
    (choice,) = server.post(
        TEXT, {"prompt": "The list", "temperature": 0, "max_tokens": 20, "stop": [stop]}
    ).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    wanted = llm.encode(" zip", add_bos=False)[0]
    for bias in ({str(wanted): 100}, [[wanted, 100]]):
        (choice,) = server.post(TEXT, {"prompt": "A", "logit_bias": bias, **GREEDY}).json["choices"]
        assert choice["text"] == llm.decode([wanted]) * 8
    seeded = {"prompt": "A", "temperature": 1.5, "max_tokens": 8}
    texts = [
        server.post(TEXT, {**seeded, "seed": seed}).json["choices"][0]["text"]
        for seed in (-7, -7, 2**64 - 7, 3)
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["unit", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "form",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"guided_json": SCHEMA},
    ],
)
def test_structured_output(server: LiveServer, form: dict[str, Any]) -> None:
    (choice,) = server.post(CHAT, {"messages": HI, "max_tokens": 60, **form}).json["choices"]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_other_forms(server: LiveServer) -> None:
    def text(**form: Any) -> str:
        body = {"prompt": "A", "temperature": 0, "max_tokens": 40, **form}
        return str(server.post(TEXT, body).json["choices"][0]["text"])

    assert text(guided_choice=["red", "green"]) in ("red", "green")
    assert len(text(guided_regex="[0-9]{5}")) == 5
    assert text(grammar='start: "yes" | "no"') in ("yes", "no")
    assert text(response_format={"type": "text"}) == text()


@pytest.mark.parametrize("name", ["float", "base64", None])
def test_embeddings(server: LiveServer, llm: bitllm.LLM, name: str | None) -> None:
    texts = ["A list", "of texts"]
    found = server.post("/v1/embeddings", {"input": texts, "encoding_format": name}).json
    expected = llm.embed(texts, pooling="mean")
    rows = [each["embedding"] for each in found["data"]]
    if name == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    np.testing.assert_array_equal(np.array(rows, np.float32), expected)
    assert [each["index"] for each in found["data"]] == [0, 1]
    tokens = sum(len(llm.encode(text)) for text in texts)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_embeddings_of_fewer_dimensions(server: LiveServer, llm: bitllm.LLM) -> None:
    asked = {"input": llm.encode("A list"), "dimensions": 8}
    (row,) = (each["embedding"] for each in server.post("/v1/embeddings", asked).json["data"])
    whole = llm.embed("A list", pooling="mean")[:8]
    np.testing.assert_allclose(row, whole / np.linalg.norm(whole), rtol=1e-6)
    error = refused(server.post("/v1/embeddings", {**asked, "dimensions": 257}))
    assert (error["param"], error["code"]) == ("dimensions", "invalid_value")


def test_models_without_pooling_do_not_embed() -> None:
    with live({"m": slow_llm(seconds=0)}) as server:
        assert "pooling" in refused(server.post("/v1/embeddings", {"input": "x"}))["message"]


def test_tokens_there_and_back(server: LiveServer, llm: bitllm.LLM) -> None:
    text = "The list é"
    found = server.post("/tokenize", {"content": text}).json
    assert found == {
        "tokens": llm.encode(text, add_bos=False),
        "count": len(llm.encode(text, add_bos=False)),
        "max_model_len": 512,
    }
    with_start = server.post("/tokenize", {"content": text, "add_special": True}).json
    assert with_start["tokens"] == llm.encode(text)
    assert server.post("/tokenize", {"prompt": text}).json == with_start
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json["tokens"]
    written = [
        bytes(each["piece"]) if isinstance(each["piece"], list) else each["piece"].encode()
        for each in pieces
    ]
    assert b"".join(written).decode() == text
    of_chat = server.post("/tokenize", {"messages": HI}).json["tokens"]
    assert of_chat == llm.tokenizer.encode_chat(HI)
    back = server.post("/detokenize", {"tokens": found["tokens"]}).json
    assert back == {"content": text, "prompt": text}
    refused(server.post("/detokenize", {"tokens": [4096]}))
    refused(server.post("/tokenize", {"content": "a", "prompt": "b"}))
    refused(server.post("/tokenize", {}))
    info = server.get("/tokenizer_info").json
    assert (info["bos_token"], info["vocab_size"]) == ("<|begin_of_text|>", 4096)
    assert info["chat_template"] == llm.tokenizer.chat_template


def test_the_template(server: LiveServer, llm: bitllm.LLM) -> None:
    found = server.post("/apply-template", {"messages": HI}).json
    assert found == {"prompt": llm.tokenizer.apply_chat_template(HI)}


WRONG: list[tuple[str, Any, str | None]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    (CHAT, {"messages": HI, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": "8"}, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"messages": HI, "temperature": -1}, "temperature"),
    (CHAT, {"messages": HI, "temperature": 1e400}, None),
    (CHAT, {"messages": HI, "top_p": 1.1}, "top_p"),
    (CHAT, {"messages": HI, "top_k": -3}, "top_k"),
    (CHAT, {"messages": HI, "seed": 2**64}, "seed"),
    (CHAT, {"messages": HI, "seed": -(2**63) - 1}, "seed"),
    (CHAT, {"messages": HI, "n": 0}, "n"),
    (CHAT, {"messages": HI, "n": 129}, "n"),
    (CHAT, {"messages": HI, "stop": [1]}, "stop[0]"),
    (CHAT, {"messages": HI, "stop": ""}, "stop"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": HI, "json_schema": {"type": "nonsense"}}, None),
    (CHAT, {"messages": HI, "guided_regex": "("}, None),
    (CHAT, {"messages": HI, "guided_regex": "a", "grammar": 'start: "a"'}, None),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, None),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": None}]}]}, None),
    (CHAT, {"messages": HI, "tool_choice": "required"}, None),
    (CHAT, {"messages": HI, "tools": [], "tool_choice": {"function": {"name": "x"}}}, None),
    (CHAT, {"messages": HI, "stream": True, "best_of": 2}, None),
    (CHAT, {"messages": [{"role": "user", "content": "hi " * 600}]}, None),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ["a", 1]}, "prompt"),
    (TEXT, {"prompt": [[]]}, None),
    (TEXT, {"prompt": [1.5]}, "prompt[0]"),
    (TEXT, {"prompt": [99999]}, None),
    (TEXT, {"prompt": [-1]}, None),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ["a"] * 2049}, "prompt"),
    (TEXT, {"prompt": ["a"] * 100, "n": 100}, "n"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (TEXT, {"prompt": "a", "max_tokens": 600}, None),
    (TEXT, {"prompt": "a", "echo": True, "stream": True, "logprobs": 1}, "echo"),
    (TEXT, {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    (TEXT, {"prompt": "a", "stream_options": 3}, "stream_options"),
    ("/v1/embeddings", {}, "input"),
    ("/v1/embeddings", {"input": ""}, None),
    ("/v1/embeddings", {"input": [""]}, None),
    ("/v1/embeddings", {"input": [[]]}, "input"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("/tokenize", {"content": 1}, "content"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/apply-template", {"messages": []}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_values_are_400(server: LiveServer, path: str, body: Any, param: str | None) -> None:
    error = refused(server.post(path, body))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param, error
    until(server.is_idle)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a"} trailing',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b"\x00" * 1000,
    ],
)
def test_what_is_no_request_is_400(server: LiveServer, body: bytes) -> None:
    for path in (TEXT, CHAT, "/v1/embeddings"):
        refused(server.post(path, body))


def test_other_refusals(server: LiveServer) -> None:
    refused(server.get("/nothing"), 404)
    refused(server.post("/", {}), 404 if server.get("/").status == 404 else 405)
    wrong_method = server.get(CHAT)
    refused(wrong_method, 405)
    assert "POST" in wrong_method.headers["allow"]
    refused(server.post("/health", {}), 405)
    body = json.dumps({"prompt": "a"}).encode()
    refused(server.post(TEXT, body, {"Content-Type": "text/plain"}), 415)
    refused(server.post(TEXT, body, {"Content-Encoding": "gzip"}), 415)
    assert (
        server.post(TEXT, body, {"Content-Type": "application/json; charset=utf-8"}).status == 200
    )


def test_base_models_have_no_chat() -> None:
    llm = slow_llm(seconds=0)
    llm.tokenizer._template_source = None
    with live({"base": llm}) as server:
        assert "chat template" in refused(server.post(CHAT, {"messages": HI}))["message"]


def test_too_long_a_prompt_tells_the_numbers(server: LiveServer) -> None:
    error = refused(server.post(TEXT, {"prompt": "hi " * 600}))
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "601" in error["message"] or "prompt has" in error["message"]


def test_one_model_answers_to_every_name_and_says_its_own(server: LiveServer) -> None:
    assert server.post(TEXT, {"model": "gpt-4", "prompt": "a", **GREEDY}).json["model"] == "demo"


def test_several_models_answer_to_their_own_names() -> None:
    models = {"a": slow_llm(seconds=0, next_token=saying("A")), "b": slow_llm(seconds=0)}
    with live(models) as server:
        assert [each["id"] for each in server.get("/v1/models").json["data"]] == ["a", "b"]
        for name, text in (("a", "A"), ("b", "aaa"), (None, "A"), ("", "A")):
            found = server.post(CHAT, {"model": name, "messages": HI, "max_tokens": 3}).json
            assert found["choices"][0]["message"]["content"] == text
            assert found["model"] == (name or "a")
        error = refused(server.post(CHAT, {"model": "c", "messages": HI}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_strict_server_refuses_other_names() -> None:
    with live({"m": slow_llm(seconds=0)}, strict_model=True) as server:
        refused(server.post(TEXT, {"model": "gpt-4", "prompt": "a"}), 404)
        assert server.post(TEXT, {"prompt": "a", **GREEDY}).status == 200


def test_a_text_that_takes_too_long_is_cut() -> None:
    with live({"m": slow_llm(seconds=0.02)}, timeout=0.2) as server:
        (choice,) = server.post(TEXT, {"prompt": "a", "max_tokens": 1000}).json["choices"]
        assert choice["finish_reason"] == "length"
        assert 0 < len(choice["text"]) < 100


def test_the_description_says_what_is_there(server: LiveServer) -> None:
    found = server.get("/openapi.json").json
    assert found["openapi"].startswith("3.1")
    assert len(found["paths"]) == len(ENDPOINTS)
    schemas = found["components"]["schemas"]
    chat = found["paths"][CHAT]["post"]
    place = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    request = schemas[place.removeprefix("#/components/schemas/")]
    assert request["required"] == ["messages"]
    assert "max_completion_tokens" in request["properties"]

    def validator(name: str) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        )

    answers = {
        "ChatResponse": server.post(
            CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 1, **GREEDY}
        ),
        "CompletionResponse": server.post(TEXT, {"prompt": "a", "logprobs": 1, **GREEDY}),
        "EmbeddingResponse": server.post("/v1/embeddings", {"input": "a"}),
        "ModelList": server.get("/v1/models"),
        "StatsResponse": server.get("/stats"),
        "TokenizeResponse": server.post("/tokenize", {"content": "a", "with_pieces": True}),
        "TokenizerInfo": server.get("/tokenizer_info"),
        "ErrorResponse": server.post(CHAT, {}),
    }
    for name, answer in answers.items():
        validator(name).validate(answer.json)
    with pytest.raises(jsonschema.ValidationError):
        validator("ChatRequest").validate({"messages": 3})


def test_figures_count_what_was_done() -> None:
    with live({"m": slow_llm(seconds=0)}) as server:
        server.post(TEXT, {"prompt": "abc", "max_tokens": 5})
        server.post(TEXT, {"prompt": "abc", "max_tokens": 5, "stream": True})
        server.post(TEXT, {"prompt": 3})
        server.ask("BREW", "/nothing\\", headers={})
        answer = server.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = answer.body.decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        route = '{route="/v1/completions",method="POST",status='
        assert values[f'bitllm_requests_total{route}"200"}}'] == "2"
        assert values[f'bitllm_requests_total{route}"400"}}'] == "1"
        assert values['bitllm_requests_total{route="other",method="other",status="404"}'] == "1"
        assert values['bitllm_prompt_tokens_total{model="m"}'] == "8"
        assert values['bitllm_completion_tokens_total{model="m"}'] == "10"
        assert values['bitllm_time_to_first_token_seconds_count{model="m"}'] == "1"
        assert values['bitllm_inter_token_seconds_count{model="m"}'] == "4"
        assert values['bitllm_inter_token_seconds_bucket{model="m",le="+Inf"}'] == "4"
        assert values['bitllm_request_seconds_count{model="m"}'] == "2"
        assert values['bitllm_decoded_tokens_total{model="m"}'] == "8"
        assert values["bitllm_requests_under_way"] == "0"
        named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
        assert all(line.split()[2] in named for line in lines if line.startswith("# HELP"))
        stats = server.get("/stats").json
        assert stats["models"][0]["load"]["decoded_tokens"] == 8
