"""Other people's clients against a live server: LangChain, lm-eval, llm, and schemathesis."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import bitllm
from live_server import LiveServer, live

# Those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")

QUESTION = "What is a list?"


class Pair(pydantic.BaseModel):
    """Two words."""

    first: str = pydantic.Field(max_length=8)
    second: str = pydantic.Field(max_length=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[bitllm.LLM]:
    with bitllm.load(threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    models = {"demo": bitllm.load(threads=1, kv_tokens=4096)}
    with live(models, pooling="mean", api_keys=("right",)) as server:
        yield server


@pytest.fixture(scope="module")
def langchain(server: LiveServer) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="right", model="demo", temperature=0, max_tokens=12
    )


def test_langchain_answers_and_streams(langchain: Any, llm: bitllm.LLM) -> None:
    expected = llm.chat(QUESTION, temperature=0, max_tokens=12)
    answer = langchain.invoke(QUESTION)
    assert answer.content == expected.text
    assert answer.usage_metadata["input_tokens"] == expected.usage.prompt_tokens
    assert answer.response_metadata["finish_reason"] == expected.finish_reason
    chunks = list(langchain.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == expected.text
    assert len([chunk for chunk in chunks if chunk.content]) > 1


def test_langchain_calls_tools_and_reads_structures(langchain: Any) -> None:
    def note(word: str) -> str:
        """Note a word."""
        return word

    tools = langchain.bind_tools([note], tool_choice="note")
    answer = tools.bind(max_tokens=200, temperature=1, seed=1).invoke(QUESTION)
    (call,) = answer.tool_calls
    assert call["name"] == "note"
    assert isinstance(call["args"]["word"], str)
    wide = langchain.model_copy(update={"max_tokens": 200})
    found = wide.with_structured_output(Pair, method="json_schema").invoke(QUESTION)
    assert isinstance(found, Pair)


def test_langchain_embeds(server: LiveServer, llm: bitllm.LLM) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="right", model="demo", check_embedding_ctx_length=False
    )
    expected = llm.embed([QUESTION], pooling="mean")[0].tolist()
    assert embeddings.embed_query(QUESTION) == pytest.approx(expected, abs=1e-7)


def test_lm_eval_scores_through_the_server(
    server: LiveServer, llm: bitllm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "right")
    remote = LocalCompletionsAPI(
        model="demo",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="remote",
        tokenized_requests=True,
        num_concurrent=1,
        auth_token="right",
        max_length=512,
        max_gen_toks=16,
    )
    pairs = [("The list", " is a list"), ("A function", " returns"), ("A function", " zebra")]
    asked: Any = [SimpleNamespace(args=pair, arguments=pair) for pair in pairs]
    found = remote.loglikelihood(asked, disable_tqdm=True)
    # By this way lm-eval asks for no start token.
    expected = [llm.score(llm.encode(one, add_bos=False), other) for one, other in pairs]
    assert [greedy for _, greedy in found] == [each.greedy for each in expected]
    assert [score for score, _ in found] == pytest.approx([each.logprob for each in expected])


def test_simonw_llm(server: LiveServer, llm: bitllm.LLM, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: demo\n  api_base: {server.url}/v1\n  api_key_name: ours\n"
    )
    (tmp_path / "keys.json").write_text('{"ours": "right"}')
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "ours", "-o", "temperature", "0",
         "-o", "max_tokens", "12", QUESTION],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = llm.chat(QUESTION, temperature=0, max_tokens=12).text
    assert done.stdout.strip() == expected.strip()


@pytest.fixture(scope="module")
def schema(server: LiveServer) -> Any:
    import schemathesis

    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_whatever_the_description_allows_is_no_failure(schema: Any, server: LiveServer) -> None:
    for found in schema.get_all_operations():
        statuses: list[int] = []
        ask_all(found.ok(), statuses)
        assert statuses, found.ok().label
        assert max(statuses) < 500
    assert server.get("/health").status == 200


def ask_all(operation: Any, statuses: list[int]) -> None:
    """Ask an endpoint many things, and note the status of each answer."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and type(case.body.get("max_tokens", 9)) is int:
            case.body["max_tokens"] = min(4, case.body.get("max_tokens", 4))  # to be done soon
        answer = case.call(headers={"Authorization": "Bearer right"}, timeout=60)
        statuses.append(answer.status_code)

    ask()
