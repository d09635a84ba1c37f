"""Scores, perplexity, logits and embeddings: the engine's batches against bare decoder steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batches import Run, logits_of, make_batch
from bitllm import (
    LLM,
    CheckpointError,
    ConfigError,
    ContextOverflowError,
    InsufficientMemoryError,
    SamplingParams,
)
from bitllm.backends.base import OutputKind, StepOutput
from bitllm.backends.sampling import score_row
from bitllm.engine import readout
from bitllm.engine.loading import load
from bitllm.engine.scoring import hidden_request
from byte_tokenizer import byte_tokenizer
from cli_model import write_model
from fake_decoder import FakeDecoder

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["cpu", "reference"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with load(str(model), device=request.param, context=CONTEXT, max_batch_tokens=16) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def truth(model: Path) -> Iterator[LLM]:
    """The reference decoder, which computes each text of these tests in one step."""
    with load(str(model), device="reference", context=CONTEXT, max_batch_tokens=256) as loaded:
        yield loaded


def reference_logits(truth: LLM, ids: list[int]) -> np.ndarray:
    return logits_of(truth._engine._decoder, ids)


def fake_llm(**options: Any) -> LLM:
    return LLM(
        FakeDecoder(**options),
        byte_tokenizer(),
        name="fake",
        context=CONTEXT,
        max_batch_tokens=64,
    )


TEXT = list(b"Some text of forty-odd bytes, to be read.")


@pytest.mark.parametrize("start", [0, 1, 17, len(TEXT) - 1])
def test_logits_are_those_of_the_reference_to_the_bit(llm: LLM, truth: LLM, start: int) -> None:
    logits = llm.forward(TEXT, start=start)
    assert logits.dtype == np.float32
    assert logits.shape == (len(TEXT) - start, llm.spec.vocab_size)
    np.testing.assert_array_equal(logits, reference_logits(truth, TEXT)[start:])
    assert llm.free_blocks == 8


def test_a_text_is_encoded_with_its_start_token(llm: LLM) -> None:
    np.testing.assert_array_equal(llm.forward("hello"), llm.forward(llm.encode("hello")))


def test_logits_of_many_words_leave_the_decoder_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readout, "_STEP_VALUES", 258 * 5)
    llm = fake_llm()
    logits = llm.forward(list(range(40)))
    decoder: Any = llm._engine._decoder
    assert [len(batch.token_ids) for batch in decoder.steps] == [5] * 8
    for position in range(40):
        expected = decoder.logits(list(range(position + 1))).astype(np.float32)
        np.testing.assert_array_equal(logits[position], expected)


def test_scores_are_those_of_the_reference_to_the_bit(llm: LLM, truth: LLM) -> None:
    prompt, continuation = TEXT[:9], TEXT[9:]
    score = llm.score(prompt, continuation, top=3)
    logits = reference_logits(truth, TEXT)
    assert [token.token_id for token in score.tokens] == continuation
    for offset, token in enumerate(score.tokens):
        logprob, ids, logprobs = score_row(logits[8 + offset], continuation[offset], 3)
        assert token.logprob == float(logprob)
        assert token.top == tuple(zip(ids.tolist(), logprobs.astype(float).tolist(), strict=True))
    assert score.logprob == math.fsum(token.logprob for token in score.tokens)
    assert not score.greedy


def test_greedy_tells_what_the_model_would_have_written(llm: LLM) -> None:
    written = list(llm.generate(TEXT, max_tokens=5, ignore_eos=True).token_ids)
    assert llm.score(TEXT, written).greedy
    other = [*written[:4], (written[4] + 1) % 250]
    assert not llm.score(TEXT, other).greedy
    assert llm.score(TEXT, written, top=0).tokens[0].top == ()


def test_scoring_many_is_as_one_by_one(llm: LLM) -> None:
    prompts, continuations = ["one", "two", "a third"], [" a", " bc", " def"]
    together = llm.score(prompts, continuations, top=1)
    for prompt, continuation, score in zip(prompts, continuations, together, strict=True):
        assert score == llm.score(prompt, continuation, top=1)
    shared = llm.score("one", continuations)
    assert shared == [llm.score("one", each) for each in continuations]
    assert llm.score([1, 2], [[3], [4, 5]]) == [llm.score([1, 2], [3]), llm.score([1, 2], [4, 5])]
    assert llm.free_blocks == 8


def test_more_jobs_than_fit_at_once_come_back_in_order() -> None:
    llm = fake_llm()
    continuations = [[n % 250, n % 7] for n in range(200)]
    scores = llm.score([1, 2, 3], continuations)
    assert [[token.token_id for token in score.tokens] for score in scores] == continuations
    assert scores[150] == llm.score([1, 2, 3], continuations[150])
    assert llm.free_blocks == 8


@pytest.mark.parametrize(
    ("prompt", "continuation", "says"),
    [
        (np.zeros(0, np.int64), [1], "prompt has no tokens"),
        ([1], "", "continuation has no tokens"),
        ([], [1], "0 prompts for 1 continuations"),
        ([1], [300], "the continuation: token id 300 is outside"),
        ([300], [1], "the text: token id 300 is outside"),
        ([[1], [2]], [1], "2 prompts for 1 continuations"),
        ([[1], [2]], [[1], [2], [3]], "2 prompts for 3 continuations"),
        ([[1]], [1], "1 prompts for 1 continuations"),
        ([1.5], [1], "whole numbers"),
    ],
)
def test_nothing_to_score(prompt: Any, continuation: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fake_llm().score(prompt, continuation)


def test_a_context_that_is_too_short() -> None:
    llm = fake_llm()
    assert len(llm.score([1] * 200, [2] * 57).tokens) == 57
    for act in (
        lambda: llm.score([1] * 200, [2] * 58),
        lambda: llm.forward([1] * 257),
        lambda: llm.embed([[1] * 257], pooling="mean"),
    ):
        with pytest.raises(ContextOverflowError, match="257 tokens, but the context holds 256"):
            act()
    for act in (lambda: llm.forward([]), lambda: llm.embed([[]], pooling="last")):
        with pytest.raises(ConfigError, match="no tokens"):
            act()
    with pytest.raises(ConfigError, match="start must be 0 to 2"):
        llm.forward([1, 2, 3], start=3)
    with pytest.raises(ConfigError, match="top must be 0 to 258"):
        llm.score([1], [2], top=259)


def test_perplexity_of_a_text_that_fits_is_that_of_its_tokens(llm: LLM) -> None:
    score = llm.score(TEXT[:1], TEXT[1:])
    assert llm.perplexity(TEXT) == pytest.approx(math.exp(-score.logprob / 40), rel=1e-12)
    assert llm.perplexity("hello") == llm.perplexity(llm.encode("hello"))


def test_a_first_token_that_is_not_scored_does_not_count_as_bytes() -> None:
    llm = fake_llm()
    llm.tokenizer._before = []  # no start token
    assert llm.encode("ab") == list(b"ab")
    score = llm.score_text("hellö")
    assert (score.tokens, score.text_bytes) == (5, 5)
    assert llm.score_text(list(b"hello")).bits_per_byte is None


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 150), window=st.integers(2, 60), data=st.data())
def test_windows_score_each_token_once_with_the_promised_context(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    llm = fake_llm()
    decoder: Any = llm._engine._decoder
    ids = np.random.default_rng(length).integers(0, 258, length).tolist()
    # The window that scores token t begins at the first multiple of the stride that reaches it.
    logprobs = []
    for token in range(1, length):
        start = max(0, -(-(token - window + 1) // stride)) * stride
        raw = decoder.logits(ids[start:token])
        logprobs.append(raw[ids[token]] - np.log(np.exp(raw).sum()))
        assert start == 0 or token - start >= window - stride
    expected = math.exp(-np.mean(logprobs))
    found = llm.perplexity(ids, context=window, stride=stride)
    assert found == pytest.approx(expected, rel=1e-5)
    assert llm.free_blocks == 8


@pytest.mark.parametrize(
    ("ids", "options", "says"),
    [
        ([1], {}, "two tokens or more, got 1"),
        ([1, 2], {"context": 1}, "context must be 2 to 256"),
        ([1, 2], {"context": 257}, "context must be 2 to 256"),
        ([1, 2], {"context": 8, "stride": 8}, "stride must be 1 to 7"),
        ([1, 2], {"stride": 0}, "stride must be 1 to 255"),
    ],
)
def test_windows_that_cannot_be(ids: list[int], options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fake_llm().perplexity(ids, **options)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states_of_the_reference(
    llm: LLM, truth: LLM, pooling: Any
) -> None:
    batch = make_batch([Run(TEXT)], OutputKind.HIDDEN)
    hidden = truth._engine._decoder.forward(batch).hidden
    raw = llm.embed([TEXT, TEXT[:5]], pooling=pooling, normalize=False)
    assert raw.shape == (2, llm.spec.hidden_size)
    wanted = hidden[-1] if pooling == "last" else hidden.mean(axis=0, dtype=np.float64)
    np.testing.assert_array_equal(raw[0], wanted.astype(np.float32))
    unit = llm.embed(TEXT, pooling=pooling)
    assert unit.shape == (llm.spec.hidden_size,)
    np.testing.assert_allclose(np.linalg.norm(unit), 1, rtol=1e-6)
    np.testing.assert_allclose(unit, raw[0] / np.linalg.norm(raw[0]), rtol=1e-5)


def test_pooling_is_the_models_own_or_said() -> None:
    with pytest.raises(ConfigError, match="not made for embeddings"):
        fake_llm().embed("a")
    with pytest.raises(ConfigError, match="mean, last, got 'cls'"):
        fake_llm().embed("a", pooling="cls")  # type: ignore[arg-type]
    pooled = fake_llm(spec=replace(FakeDecoder().spec, pooling="last"))
    np.testing.assert_array_equal(pooled.embed("a"), pooled.embed("a", pooling="last"))
    assert pooled.embed([]).shape == (0, 8)


def test_the_prompt_may_be_scored_while_the_answer_is_written(llm: LLM) -> None:
    plain = llm.generate(TEXT, max_tokens=6, temperature=0.7, seed=4)
    echoed = llm.generate(TEXT, max_tokens=6, temperature=0.7, seed=4, prompt_logprobs=2)
    assert plain.prompt_logprobs is None
    assert echoed.token_ids == plain.token_ids
    assert echoed.prompt_logprobs == llm.score(TEXT[:1], TEXT[1:], top=2).tokens
    last = list(llm.stream(TEXT, max_tokens=6, temperature=0.7, seed=4, prompt_logprobs=2))[-1]
    assert last.prompt_logprobs == echoed.prompt_logprobs


def test_choices_share_the_scores_of_their_prompt(llm: LLM) -> None:
    result = llm.generate(TEXT, n=3, max_tokens=4, temperature=0.9, seed=2, prompt_logprobs=1)
    alone = llm.generate(TEXT, n=3, max_tokens=4, temperature=0.9, seed=2)
    expected = llm.score(TEXT[:1], TEXT[1:], top=1).tokens
    assert [each.token_ids for each in result.choices] == [each.token_ids for each in alone.choices]
    assert [each.prompt_logprobs for each in result.choices] == [expected] * 3


def test_choices_of_an_echo_end_too(llm: LLM) -> None:
    result = llm.generate(TEXT, n=3, max_tokens=0, prompt_logprobs=0)
    assert [each.token_ids for each in result.choices] == [()] * 3
    assert {each.prompt_logprobs for each in result.choices} == {result.prompt_logprobs}
    assert llm.free_blocks == 8


def test_a_kept_prefix_changes_no_row(llm: LLM, truth: LLM) -> None:
    long = [n % 250 for n in range(100)]
    llm.generate(long, max_tokens=1)  # its blocks are kept
    logits = reference_logits(truth, long)
    for start in (0, 31, 32, 64, 70, 99):
        np.testing.assert_array_equal(llm.forward(long, start=start), logits[start:])
    np.testing.assert_array_equal(
        llm.embed(long, pooling="last"), truth.embed(long, pooling="last")
    )
    assert llm.score(long[:70], long[70:], top=1) == truth.score(long[:70], long[70:], top=1)


def test_echo_alone_writes_nothing(llm: LLM) -> None:
    result = llm.generate(TEXT, max_tokens=0, prompt_logprobs=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert result.prompt_logprobs == llm.score(TEXT[:1], TEXT[1:]).tokens
    assert llm.generate([65], max_tokens=0, prompt_logprobs=1).prompt_logprobs == ()
    assert llm.generate("x" * (CONTEXT - 1), max_tokens=0, prompt_logprobs=1).token_ids == ()
    assert llm.free_blocks == 8
    with pytest.raises(ConfigError, match="max_tokens must be at least 1"):
        SamplingParams(max_tokens=0)
    with pytest.raises(ConfigError, match="prompt_logprobs is 300"):
        llm.generate(TEXT, prompt_logprobs=300)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_reading_and_writing_share_batches(data: st.DataObject) -> None:
    """Whatever runs together, in whatever pieces, with too few blocks for all: the same rows."""
    llm = fake_llm(blocks=data.draw(st.integers(3, 8)), max_batch_tokens=64)
    llm._engine._scheduler._max_batch_tokens = data.draw(st.integers(1, 40))
    decoder: Any = llm._engine._decoder
    sizes = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=6))
    prompts = [[(7 * i + j) % 250 for j in range(size)] for i, size in enumerate(sizes)]
    asked = SamplingParams(max_tokens=data.draw(st.integers(0, 20)), prompt_logprobs=1)
    for prompt, result in zip(prompts, llm.generate(prompts, params=asked), strict=True):
        assert result.prompt_logprobs is not None
        tokens = [*prompt, *result.token_ids]
        for place, entry in enumerate(result.prompt_logprobs, start=1):
            raw = decoder.logits(prompt[:place])
            assert entry.token_id == prompt[place]
            expected = raw[prompt[place]] - np.log(np.exp(raw).sum())
            assert entry.logprob == pytest.approx(expected, rel=1e-5)
            assert entry.top[0][0] == int(raw.argmax())
        for place in range(len(prompt), len(tokens)):
            assert tokens[place] == int(decoder.logits(tokens[:place]).argmax())
    assert llm.free_blocks == decoder.kv_capacity


def test_a_step_that_breaks_off_loses_no_row() -> None:
    llm = fake_llm()
    llm._engine._scheduler._max_batch_tokens = 7
    expected = llm.forward(list(range(50)))
    decoder: Any = llm._engine._decoder
    decoder.steps.clear()

    def interrupt() -> None:
        if len(decoder.steps) == 4:
            raise KeyboardInterrupt

    decoder.on_step = interrupt
    sequence = llm._engine.add(_logits_of(llm, 50))
    with pytest.raises(KeyboardInterrupt):
        llm._engine.finish(sequence)
    assert sequence.rows is not None
    assert sequence.rows.done == 21
    llm._engine.finish(sequence)
    np.testing.assert_array_equal(sequence.rows_read().values, expected)


def _logits_of(llm: LLM, count: int) -> Any:
    from bitllm.engine.scoring import logits_request

    return logits_request(list(range(count)), 0, llm.spec, llm.context)


def test_scores_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_llm()
    decoder: Any = llm._engine._decoder
    forward = decoder.forward

    def damaged(batch: Any) -> StepOutput:
        output: StepOutput = forward(batch)
        output.logprobs[:] = np.nan
        return output

    monkeypatch.setattr(decoder, "forward", damaged)
    with pytest.raises(CheckpointError, match="computes no number"):
        llm.score("a", "b")
    with pytest.raises(CheckpointError, match="computes no number"):
        llm.generate("ab", max_tokens=3, prompt_logprobs=0)
    assert llm.free_blocks == 8


def test_what_was_read_is_freed_with_the_last_who_has_it(llm: LLM) -> None:
    logits = llm.forward("all logits of a text may be gigabytes")
    gone = weakref.ref(logits)
    del logits
    assert gone() is None


def test_rows_that_no_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_llm()

    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(readout.np, "empty", no_memory)
    with pytest.raises(InsufficientMemoryError, match=r"5 rows of float32 \[258\]"):
        llm.forward([1, 2, 3, 4, 5])


def test_who_waits_for_an_answer_goes_before_what_reads_whole_files() -> None:
    llm = fake_llm()
    asked = [hidden_request([65] * 60, "last", llm.spec, CONTEXT) for _ in range(16)]
    reading = [llm._engine.add(request) for request in asked]
    answer = llm.generate("hi", max_tokens=3, ignore_eos=True)
    assert len(answer.token_ids) == 3
    assert sum(each.finished for each in reading) <= 4  # one fits beside each of its steps
    for sequence in reading:
        llm._engine.finish(sequence)
        llm._engine.abort(sequence)
