"""From files to text, with the real decoders."""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bitllm
from bitllm import (
    LLM,
    BackendUnavailableError,
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    SamplingParams,
)
from bitllm.backends import DEVICE_VARIABLE
from bitllm.backends.cpu import CpuBackend
from bitllm.engine import loading
from bitllm.engine.loading import DEMO_NOTICE, load, model_defaults
from bitllm.engine.request import ModelDefaults
from bitllm.formats import GenerationDefaults, ModelFiles
from cli_model import write_model

DEVICES = ["cpu", "reference"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=DEVICES)
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with load(str(model), device=request.param, context=256, max_batch_tokens=16) as loaded:
        yield loaded


def random_prompts(count: int) -> list[str]:
    choice = random.Random(5)
    return ["".join(chr(choice.randint(32, 400)) for _ in range(n)) for n in range(1, count + 1)]


def test_a_loaded_model_tells_about_itself(llm: LLM) -> None:
    assert (llm.name, llm.context) == ("tiny", 256)
    assert llm.info.backend in repr(llm)
    assert llm.plan is not None
    assert llm.plan.kv_tokens == 256
    assert llm.defaults.stop_ids == llm.tokenizer.stop_ids


def test_it_says_why_it_runs_where_it_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    with load(str(model), context=64) as llm:
        assert "on cpu (" in repr(llm)
        assert "chosen by auto" in llm.device_reason
        assert llm.device_reason in repr(llm)
    monkeypatch.setenv(DEVICE_VARIABLE, "reference")
    with load(str(model), context=64) as llm:
        assert "on reference (" in repr(llm)
        assert f"set by {DEVICE_VARIABLE}" in repr(llm)
    with load(str(model), context=64, device="cpu") as llm:
        assert "asked for" in repr(llm)


def test_a_gpu_that_is_missing_raises_and_nothing_stands_in_for_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU") as caught:
        load(str(model), device="cuda")
    assert caught.value.hint
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU"):
        load(str(model))


def test_a_native_module_that_is_missing_raises_with_the_install_line(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitllm.backends.cpu", None)
    with pytest.raises(BackendUnavailableError, match="cpu backend") as caught:
        load(str(model))
    assert "pip install 'bitllm'" in str(caught.value.hint)


def test_a_model_is_a_function_from_text_to_text(llm: LLM) -> None:
    expected = llm.generate("hello", max_tokens=9, stop="x").text
    assert llm("hello", max_tokens=9, stop="x") == expected
    write = functools.partial(llm, params=SamplingParams(max_tokens=5))
    assert [*map(write, ["a", "b"])] == [
        each.text for each in llm.generate(["a", "b"], max_tokens=5)
    ]
    with pytest.raises(ConfigError, match="one prompt"):
        llm(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_tokns"):
        llm("a", max_tokns=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_prefix_cache_can_be_switched_off(model: Path, prefix_cache: bool) -> None:
    with load(str(model), context=256, prefix_cache=prefix_cache) as llm:
        prompt = random_prompts(70)[-1]
        first, again = (llm.generate(prompt, max_tokens=5, logprobs=3) for _ in range(2))
        assert (first.token_ids, first.logprobs) == (again.token_ids, again.logprobs)
        assert (again.usage.cached_tokens > 0) is (llm.stats().hit_rate > 0) is prefix_cache


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_together_is_as_one_by_one(llm: LLM, temperature: float) -> None:
    prompts = random_prompts(7)
    options: Any = {"temperature": temperature, "seed": 3, "max_tokens": 12, "logprobs": 2}
    together = llm.generate(prompts, **options)
    for prompt, one in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, **options)
        assert alone.token_ids == one.token_ids
        assert alone.logprobs == one.logprobs
    assert llm.free_blocks == 8


def test_stream_joined_is_generate(llm: LLM) -> None:
    for prompt in random_prompts(3):
        whole = llm.generate(prompt, max_tokens=20, temperature=0.8, seed=1, top_k=20)
        chunks = list(llm.stream(prompt, max_tokens=20, temperature=0.8, seed=1, top_k=20))
        assert "".join(map(str, chunks)) == whole.text == llm.decode(whole.token_ids)


def test_a_stop_string_cuts_the_text(llm: LLM) -> None:
    whole = llm.generate("hello", max_tokens=40)
    middle = whole.text[10:14]
    cut = llm.generate("hello", max_tokens=40, stop=middle)
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop"


def test_min_tokens_and_penalties_reach_the_sampler(llm: LLM) -> None:
    free = llm.generate("hello", max_tokens=4)
    banned = llm.generate(
        "hello", max_tokens=4, min_tokens=4, stop_token_ids=[*set(free.token_ids)]
    )
    assert not set(banned.token_ids) & set(free.token_ids)
    biased = llm.generate("hello", max_tokens=3, logit_bias={97: 1000.0})
    assert biased.token_ids == (97, 97, 97)
    varied = llm.generate("hello", max_tokens=40, presence_penalty=1000.0)
    assert len(set(varied.token_ids)) == 40


def test_both_devices_write_the_same(model: Path) -> None:
    texts = []
    for device in DEVICES:
        with load(str(model), device=device, kv_dtype="fp32") as llm:
            texts.append([llm.generate(prompt, max_tokens=30).text for prompt in random_prompts(4)])
    assert texts[0] == texts[1]


def test_chat_ends_in_an_answer(llm: LLM) -> None:
    assert llm.chat("hi", max_tokens=3).usage.completion_tokens == 3


def test_a_small_cache_serves_many_by_turns(model: Path) -> None:
    prompts = [f"{index} " * 20 for index in range(6)]
    with load(str(model), context=64, kv_tokens=96) as tight:
        few = tight.generate(prompts, max_tokens=15)
        assert tight.free_blocks == 3
    with load(str(model), context=64, kv_tokens=1024) as roomy:
        assert [each.token_ids for each in few] == [
            each.token_ids for each in roomy.generate(prompts, max_tokens=15)
        ]


LOOP = "one two three four. one two three four. one two"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}])
def test_texts_with_guesses_are_those_without(
    model: Path, device: str, sampling: dict[str, Any]
) -> None:
    """Log-probabilities, too; the second model is the same one, so that its guesses are right."""
    loads: list[Any] = [{"speculation": "off"}, {}, {"draft_model": str(model)}]
    results = []
    for options in loads:
        with load(str(model), device=device, context=256, **options) as llm:
            texts = [
                llm.generate(prompt, max_tokens=60, logprobs=3, **sampling)
                for prompt in (LOOP, "x", LOOP)
            ]
            results.append([(each.text, each.token_ids, each.logprobs) for each in texts])
            stats = llm.stats()
            usage = [(each.usage.drafted_tokens, each.usage.accepted_tokens) for each in texts]
            assert sum(drafted for drafted, _ in usage) == stats.drafted_tokens
            assert sum(accepted for _, accepted in usage) == stats.accepted_tokens
            assert (llm.plan is not None and llm.plan.draft > 0) is ("draft_model" in options)
            if options.get("speculation") == "off":
                assert stats.drafted_tokens == 0
    assert results[0] == results[1] == results[2]


def test_a_draft_model_of_another_vocabulary(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="draft_model other has another vocabulary"):
        load(str(model), context=256, draft_model=str(other))


def test_a_draft_model_counts_as_memory(model: Path) -> None:
    with load(str(model), context=256) as llm:
        assert llm.plan is not None
        alone = llm.plan.total
    with pytest.raises(InsufficientMemoryError, match="draft model"):
        load(str(model), context=256, draft_model=str(model), memory_limit=alone + 1000)


def test_no_reference_is_the_demo_model_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ModelFiles(model, "demo", "embedded in bitllm", is_demo=True)
    monkeypatch.setattr(loading, "resolve_model", lambda ref, revision: demo)
    with bitllm.load() as llm:
        assert llm.name == "demo"
    printed = capsys.readouterr()
    assert printed.err == DEMO_NOTICE + "\n"
    assert "microsoft/bitnet-b1.58-2B-4T" in DEMO_NOTICE
    assert printed.out == ""


def test_a_named_model_prints_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(str(model)).close()
    assert capsys.readouterr() == ("", "")


def test_progress_counts_the_ternary_matrices(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    with load(model, progress=lambda done, total: seen.append((done, total))) as llm:
        total = 7 * len(llm.spec.layers)
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_too_little_memory_is_told_before_weights_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuBackend, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InsufficientMemoryError, match="tiny does not fit into memory_limit"):
        load(str(model), memory_limit=60_000)


def test_options_that_cannot_be_meant(model: Path) -> None:
    with pytest.raises(ConfigError, match="no engine option 'thread'") as caught:
        load(str(model), thread=2)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean 'threads'?"
    with pytest.raises(ConfigError, match="context is 100000"):
        load(str(model), context=100_000)
    with pytest.raises(ConfigError, match="unknown device 'gpu9'"):
        load(str(model), device="gpu9")


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    suggested = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_new_tokens": 5,
        "eos_token_id": [7, 9],
    }
    (model / "generation_config.json").write_text(json.dumps(suggested))
    with load(str(model)) as llm:
        assert "temperature=0.6, top_p=0.9, max_tokens=5" in repr(llm)
        assert {7, 9} < llm.defaults.stop_ids
        result = llm.generate("hello", ignore_eos=True)
        assert result.seed is not None
        assert len(result.token_ids) == 5


@pytest.mark.parametrize(
    ("suggested", "temperature"),
    [
        (GenerationDefaults(), 0.0),
        (GenerationDefaults(do_sample=True), 1.0),
        (GenerationDefaults(temperature=0.6), 0.6),
        (GenerationDefaults(do_sample=False, temperature=0.6), 0.0),
        (GenerationDefaults(temperature=1e-6), 0.0),
    ],
)
def test_when_a_model_samples(suggested: GenerationDefaults, temperature: float) -> None:
    assert model_defaults(suggested, frozenset()).temperature == temperature


def test_odd_suggestions() -> None:
    found = model_defaults(GenerationDefaults(top_k=-1, eos_token_ids=(3,)), frozenset({2}))
    assert found == ModelDefaults(stop_ids=frozenset({2, 3}))
    with pytest.raises(FormatError, match=r"generation_config.json: top_p must be above 0"):
        model_defaults(GenerationDefaults(top_p=0.0), frozenset())


@pytest.mark.parametrize("text", ["{", "[]", '{"top_k": "many"}'])
def test_a_broken_generation_config_is_a_format_error(tmp_path: Path, text: str) -> None:
    model = write_model(tmp_path / "tiny")
    (model / "generation_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"generation_config\.json: "):
        load(str(model), device="reference")
