"""LLM: what people call, on a fake decoder and a byte tokenizer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitllm import LLM, ChatTemplateError, Completion, ConfigError, ContextOverflowError
from bitllm.config import SamplingParams
from bitllm.engine.request import DEFAULT_MAX_TOKENS, ModelDefaults
from byte_tokenizer import END, START, byte_tokenizer
from fake_decoder import FakeDecoder

CONTEXT = 256


def make_llm(
    next_token: Callable[[list[int]], int] | None = None,
    *,
    chat: bool = True,
    prefix_cache: bool = True,
    **defaults: Any,
) -> LLM:
    return LLM(
        FakeDecoder(next_token=next_token),
        byte_tokenizer(chat=chat),
        name="fake",
        context=CONTEXT,
        max_batch_tokens=64,
        defaults=ModelDefaults(stop_ids=frozenset({END}), **defaults),
        prefix_cache=prefix_cache,
    )


def decoder_of(llm: LLM) -> FakeDecoder:
    decoder = llm._engine._decoder
    assert isinstance(decoder, FakeDecoder)
    return decoder


def prompts_seen(llm: LLM) -> list[list[int]]:
    """Return the token rows of each step."""
    return [batch.token_ids.tolist() for batch in decoder_of(llm).steps]


def writes(text: str, prompt: str = "hello") -> Callable[[list[int]], int]:
    """Return a `next_token` that writes `text` and ends, after the start token and `prompt`."""
    ids, start = [*text.encode(), END], len(prompt.encode()) + 1
    return lambda tokens: ids[(len(tokens) - start) % len(ids)]


def test_generate_continues_a_text() -> None:
    llm = make_llm(writes(" wörld"))
    result = llm.generate("hello")
    assert isinstance(result, Completion)
    assert str(result) == result.text == " wörld"
    assert result.token_ids == (*" wörld".encode(), END)
    assert result.finish_reason == "stop"
    assert prompts_seen(llm)[0] == [START, *b"hello"]


def test_token_ids_are_used_as_they_are() -> None:
    for ids in ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int64)):
        llm = make_llm()
        llm.generate(ids, max_tokens=1)  # type: ignore[call-overload]
        assert prompts_seen(llm) == [[1, 2, 3]]


def test_a_list_of_prompts_gives_a_list() -> None:
    llm = make_llm()
    results = llm.generate(["one", "two"], max_tokens=3)
    assert [each.text for each in results] == [
        llm.generate(prompt, max_tokens=3).text for prompt in ("one", "two")
    ]
    assert len(llm.generate([[1, 2], [3]], max_tokens=3)) == 2
    assert llm.generate([]) == []  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (7, "text or a list of token ids, got int"),
        (None, "text or a list of token ids, got NoneType"),
        ([1.5], "whole numbers"),
        ([[1], ["a"]], "whole numbers"),
        ([[1, [2]]], "whole numbers"),
        ([[1, [2, 3]], [4]], "whole numbers"),
        (["a", [1.5]], "whole numbers"),
        ([300], "token id 300 is outside"),
        ([-1], "token id -1 is outside"),
        ([[]], "no tokens"),
    ],
)
def test_prompts_that_are_none(prompt: Any, says: str) -> None:
    llm = make_llm()
    with pytest.raises(ConfigError, match=says):
        llm.generate(prompt)
    assert prompts_seen(llm) == []


def test_options_are_checked_before_any_work() -> None:
    llm = make_llm()
    with pytest.raises(ConfigError, match="no sampling option 'temprature'"):
        llm.generate("hello", temprature=1)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="no sampling option"):
        llm.stream("hello", max_token=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="params must be SamplingParams"):
        llm.generate("hello", params={"top_k": 1})  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="stop_token_ids: token id 258"):
        llm.generate("hello", stop_token_ids=[258])
    with pytest.raises(ConfigError, match="logit_bias: token id 999"):
        llm.generate("hello", logit_bias={999: 1.0})
    with pytest.raises(ConfigError, match="logprobs is 259"):
        llm.generate("hello", logprobs=259)
    with pytest.raises(ConfigError, match="stream takes one prompt"):
        llm.stream(["a", "b"])
    assert prompts_seen(llm) == []


def test_single_options_override_params() -> None:
    llm = make_llm()
    params = SamplingParams(max_tokens=3, logprobs=1)
    result = llm.generate("hello", params=params, max_tokens=2)
    assert len(result.token_ids) == 2
    assert result.logprobs is not None


def test_defaults_of_the_model_hold_until_overridden() -> None:
    llm = make_llm(
        temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, typical_p=0.7, repetition_penalty=1.5
    )
    llm.generate("hello", max_tokens=1)
    plan = decoder_of(llm).steps[-1].plan
    assert plan.temperature.tolist() == [0.5]
    assert plan.top_k.tolist() == [7]
    assert plan.top_p.tolist() == pytest.approx([0.9])
    assert plan.min_p.tolist() == pytest.approx([0.1])
    assert plan.typical_p.tolist() == pytest.approx([0.7])
    assert plan.repetition_penalty.tolist() == [1.5]
    llm.generate(
        "hello", max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1
    )
    plan = decoder_of(llm).steps[-1].plan
    assert plan.temperature.tolist() == [0.0]
    assert plan.top_k.tolist() == [0]
    assert plan.top_p.tolist() == [1.0]
    assert plan.min_p.tolist() == [0.0]
    assert plan.repetition_penalty.tolist() == [1.0]


def test_a_seed_that_was_not_given_is_drawn_and_told() -> None:
    llm = make_llm()
    first, second = (llm.generate("hello", temperature=1.0, max_tokens=20) for _ in range(2))
    assert first.seed is not None
    assert first.seed != second.seed
    again = llm.generate("hello", temperature=1.0, max_tokens=20, seed=first.seed)
    assert again.token_ids == first.token_ids
    assert llm.generate("hello", max_tokens=1, seed=5).seed is None  # nothing was drawn


def test_each_prompt_of_a_list_draws_a_seed_of_its_own() -> None:
    first, second = make_llm().generate(["hello", "hello"], temperature=1.0, max_tokens=20)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids


def test_ignore_eos_and_own_stop_ids() -> None:
    llm = make_llm(writes("abc"))
    going_on = llm.generate("hello", ignore_eos=True, max_tokens=8)
    assert going_on.token_ids == (*b"abc", END, *b"abc", END)
    assert going_on.finish_reason == "length"
    assert going_on.text == "abcabc"
    stopped = llm.generate("hello", stop_token_ids=[ord("b")])
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")


def test_a_stop_id_outside_the_vocabulary_does_no_harm() -> None:
    llm = make_llm(writes("ab"))
    llm.defaults = ModelDefaults(stop_ids=frozenset({END, 5000}))
    assert llm.generate("hello", min_tokens=2).text == "ab"


def test_max_tokens_where_nobody_says() -> None:
    llm = make_llm(lambda tokens: 97)
    assert len(llm.generate("hello").token_ids) == CONTEXT - 6 < DEFAULT_MAX_TOKENS
    assert len(llm.generate("hello", min_tokens=9).token_ids) == CONTEXT - 6
    roomy = LLM(
        FakeDecoder(blocks=32, next_token=lambda tokens: 97),
        byte_tokenizer(),
        name="roomy",
        context=1024,
        max_batch_tokens=64,
    )
    assert len(roomy.generate("hello").token_ids) == DEFAULT_MAX_TOKENS
    assert len(roomy.generate("hello", min_tokens=300).token_ids) == 300
    capped = make_llm(lambda tokens: 97, max_tokens=12)
    assert len(capped.generate("hello").token_ids) == 12
    assert len(capped.generate("hello", min_tokens=20).token_ids) == 20
    assert len(capped.chat("hello").token_ids) == 12


def test_context_overflow_is_told_with_numbers_before_any_work() -> None:
    llm = make_llm()
    with pytest.raises(ContextOverflowError) as caught:
        llm.generate("x" * 200, max_tokens=100)
    assert "201 tokens; with max_tokens=100 that is 301, but the context holds 256" in str(
        caught.value
    )
    assert "max_tokens can be 55" in str(caught.value.hint)
    with pytest.raises(ContextOverflowError, match="256 tokens; with at least 1 more"):
        llm.generate("x" * 255)
    with pytest.raises(ContextOverflowError):
        llm.generate(["fits", "x" * 300], max_tokens=1)
    with pytest.raises(ContextOverflowError):
        llm.stream("x" * 300)
    assert prompts_seen(llm) == []
    assert len(llm.generate("x" * 200, max_tokens=55).token_ids) == 55


def test_stream_gives_whole_characters_and_a_last_chunk() -> None:
    llm = make_llm(writes("né!"))
    chunks = list(llm.stream("hello"))
    assert [str(chunk) for chunk in chunks] == ["n", "é", "!", ""]
    assert [chunk.token_ids for chunk in chunks] == [(110,), (195, 169), (33,), (END,)]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[0].usage is None
    assert llm.free_blocks == 8


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=20),
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.lists(st.text(min_size=1, max_size=1), max_size=40),
)
def test_stream_joined_is_generate(prompt: str, temperature: float, stop: list[str]) -> None:
    llm = make_llm()
    asked = SamplingParams(temperature=temperature, seed=1, stop=stop, max_tokens=30)
    whole = llm.generate(prompt, params=asked)
    chunks = list(llm.stream(prompt, params=asked))
    assert "".join(map(str, chunks)) == whole.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert chunks[-1].finish_reason == whole.finish_reason
    if whole.finish_reason == "length":
        assert whole.text == llm.decode(whole.token_ids)
    assert llm.free_blocks == 8


def test_leaving_a_stream_frees_its_blocks_at_once() -> None:
    llm = make_llm()
    for _ in llm.stream("hello" * 20):
        assert llm.free_blocks < 8
        break
    gc.collect()
    assert llm.free_blocks == 8


def test_a_stream_that_never_began_holds_nothing() -> None:
    llm = make_llm()
    llm.stream("hello")
    assert llm.free_blocks == 8
    assert prompts_seen(llm) == []


def test_streams_may_be_read_alternately() -> None:
    llm = make_llm()
    one, two = llm.stream("one", max_tokens=9), llm.stream("two", max_tokens=9)
    texts = ["", ""]
    for _ in range(9):
        texts[0] += str(next(one, ""))
        texts[1] += str(next(two, ""))
    texts[0] += "".join(map(str, one))
    texts[1] += "".join(map(str, two))
    assert texts == [str(each) for each in llm.generate(["one", "two"], max_tokens=9)]
    assert llm.free_blocks == 8


def test_interrupt_during_generate_leaves_the_llm_usable() -> None:
    llm = make_llm()
    before = llm.generate("hello", max_tokens=9)
    decoder = decoder_of(llm)

    def interrupt() -> None:
        if len(decoder.steps) % 7 == 6:
            decoder.on_step = lambda: None
            raise KeyboardInterrupt

    decoder.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello"] * 3, max_tokens=9)
    assert llm.free_blocks == 8
    assert llm.generate("hello", max_tokens=9).token_ids == before.token_ids


def test_chat_uses_the_template_and_one_start_token() -> None:
    llm = make_llm(writes("fine", "[user]hi[reply]"))
    assert str(llm.chat("hi")) == "fine"
    assert bytes(prompts_seen(llm)[0][1:]) == b"[user]hi[reply]"
    assert prompts_seen(llm)[0][0] == START
    turns = [{"role": "user", "content": "hi"}]
    assert llm.chat(turns).token_ids == llm.chat("hi").token_ids
    assert "".join(map(str, llm.chat(turns, stream=True))) == "fine"


def test_chat_fills_the_context_unless_told() -> None:
    llm = make_llm(lambda tokens: 97)
    assert len(llm.chat("hi").token_ids) == CONTEXT - 16
    assert len(llm.chat("hi", max_tokens=4).token_ids) == 4


def test_a_base_model_does_not_chat() -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        make_llm(chat=False).chat("hi")


def test_encode_and_decode() -> None:
    llm = make_llm()
    assert llm.encode("hé") == [START, *"hé".encode()]
    assert llm.encode("hé", add_bos=False) == list("hé".encode())
    assert llm.decode(np.array([START, 104, END])) == "h"  # type: ignore[arg-type]
    assert llm.decode([START, 104], skip_special=False) == "<s>h"


def test_close_and_with() -> None:
    with make_llm() as llm:
        stream = llm.stream("hello")
        next(stream)
    assert decoder_of(llm).closed
    llm.close()
    for act in (lambda: llm.generate("hello"), lambda: next(stream)):
        with pytest.raises(ConfigError, match="this model is closed"):
            act()
    assert "closed" in repr(llm)


def test_n_completions_of_one_prompt() -> None:
    llm = make_llm()
    asked = SamplingParams(temperature=1.0, seed=3, max_tokens=20, logprobs=1)
    one = llm.generate("hello" * 10, params=asked)
    assert one.choices == (one,)
    rows = len(prompts_seen(llm)[0])
    four = llm.generate("hello" * 10, params=asked, n=4)
    assert [len(step) for step in prompts_seen(llm)][20] < rows + 4  # the prompt but once
    assert [each.index for each in four.choices] == [0, 1, 2, 3]
    assert len({each.text for each in four.choices}) == 4
    assert {each.seed for each in four.choices} == {3}
    assert all(each.usage.prefill_seconds > 0 for each in four.choices)
    two = llm.generate("hello" * 10, params=asked, n=2)
    for few, many in ((one, two), (two, four)):
        for less, more in zip(few.choices, many.choices, strict=False):
            assert (less.text, less.token_ids, less.logprobs) == (
                more.text,
                more.token_ids,
                more.logprobs,
            )
    assert four.alternatives[0].alternatives == ()
    assert llm.free_blocks == 8


def test_n_for_each_prompt_of_a_list() -> None:
    llm = make_llm()
    asked = SamplingParams(temperature=1.0, seed=3, max_tokens=5)
    both = llm.generate(["one", "two"], params=asked, n=3)
    for prompt, result in zip(("one", "two"), both, strict=True):
        alone = llm.generate(prompt, params=asked, n=3)
        assert [each.text for each in result.choices] == [each.text for each in alone.choices]


def test_best_of_returns_those_of_the_highest_log_probability_a_token() -> None:
    llm = make_llm()
    asked = SamplingParams(temperature=1.0, seed=3, stop=["e", "a"], max_tokens=12)
    all_six = llm.generate("hello", params=asked, n=6, logprobs=0).choices

    def score(completion: Completion) -> float:
        assert completion.logprobs is not None
        return sum(each.logprob for each in completion.logprobs) / len(completion.token_ids)

    best = sorted(all_six, key=score, reverse=True)[:2]
    assert len({len(each.token_ids) for each in all_six}) > 1
    two = llm.generate("hello", params=asked, n=2, best_of=6)
    assert [each.index for each in two.choices] == [each.index for each in best] != [0, 1]
    assert [each.text for each in two.choices] == [each.text for each in best]
    assert all(each.logprobs is None for each in two.choices)
    shown = llm.generate("hello", params=asked, best_of=6, logprobs=2)
    assert shown.logprobs is not None
    assert len(shown.logprobs[0].top) == 2
    for stream in (llm.stream, lambda prompt, **options: llm.chat(prompt, stream=True, **options)):
        with pytest.raises(ConfigError, match="best_of=6 with n=1 cannot be streamed"):
            stream("hello", best_of=6)


def test_a_stream_of_several_choices_says_where_each_chunk_belongs() -> None:
    llm = make_llm()
    asked = SamplingParams(temperature=1.0, seed=3, stop=["e", "a"], max_tokens=30, n=3)
    whole = llm.generate("hello", params=asked)
    chunks = list(llm.stream("hello", params=asked))
    for each in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == each.index]
        assert "".join(map(str, own)) == each.text
        assert sum((chunk.token_ids for chunk in own), ()) == each.token_ids
        assert [chunk.finish_reason for chunk in own][-1] == each.finish_reason
        assert all(chunk.finish_reason is None for chunk in own[:-1])
    order = [chunk.index for chunk in chunks]
    assert order != sorted(order)  # side by side, not one after another
    assert llm.free_blocks == 8
    for _ in llm.stream("hello", params=asked):
        break
    gc.collect()
    assert llm.free_blocks == 8


def test_a_timeout_ends_a_text_with_what_there_is() -> None:
    llm = make_llm()
    whole = llm.generate("hello", max_tokens=30)
    decoder = decoder_of(llm)
    decoder.on_step = lambda: time.sleep(0.02)
    cut = llm.generate("hello", max_tokens=30, timeout=0.1)
    assert cut.finish_reason == "timeout"
    assert 0 < len(cut.token_ids) < 30
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert llm.decode(cut.token_ids) == cut.text
    chunks = list(llm.stream("hello", max_tokens=30, timeout=0.1))
    assert chunks[-1].finish_reason == "timeout"
    late, usual = llm.generate("hello", timeout=1e-9, n=2).choices
    assert (late.text, late.token_ids, late.finish_reason) == ("", (), "timeout")
    assert usual.finish_reason == "timeout"
    decoder.on_step = lambda: None
    assert llm.generate("hello", max_tokens=30, timeout=60).token_ids == whole.token_ids
    assert llm.free_blocks == 8


def test_the_timeout_of_a_stream_counts_from_the_call() -> None:
    llm = make_llm()
    passed = 0.0
    llm.engine._clock = lambda: passed
    early, late = (llm.stream("hello", max_tokens=30, timeout=5) for _ in range(2))
    passed = 4.0
    assert next(early).finish_reason is None
    passed = 6.0
    (chunk,) = late
    assert (chunk.text, chunk.finish_reason) == ("", "timeout")
    assert list(early)[-1].finish_reason == "timeout"
    assert llm.free_blocks == 8


def test_a_timeout_leaves_the_prompt_logprobs_that_were_computed() -> None:
    prompt = [START, *b"x" * 199]  # read in four steps
    llm = make_llm()
    asked: Any = {"prompt_logprobs": 1, "max_tokens": 1}
    whole = llm.generate(prompt, **asked).prompt_logprobs
    assert whole is not None
    assert llm.generate(prompt, timeout=1e-9, **asked).prompt_logprobs == ()
    decoder_of(llm).on_step = lambda: time.sleep(0.1)
    cut = llm.generate(prompt, timeout=0.05, **asked)
    assert cut.finish_reason == "timeout"
    assert cut.prompt_logprobs == whole[:64]


def test_a_conversation_is_read_once() -> None:
    turn = [START, *b"x" * 60]
    llm = make_llm()
    first = llm.generate(turn, max_tokens=40)
    assert first.usage.cached_tokens == 0
    turn += [*first.token_ids, *b"y" * 20]
    second = llm.generate(turn, max_tokens=5)
    assert second.usage.cached_tokens == 96  # of 100 that were computed, in whole blocks
    assert sum(map(len, prompts_seen(llm)[-7:])) == 121 - 96 + 4 + 2
    plain = make_llm(prefix_cache=False)
    plain.generate(turn[:61], max_tokens=40)
    again = plain.generate(turn, max_tokens=5)
    assert again.usage.cached_tokens == plain.stats().cached_blocks == 0
    assert again.token_ids == second.token_ids


def test_stats_count_what_was_done() -> None:
    llm = make_llm(lambda tokens: 97)
    before = llm.stats()
    assert (before.blocks, before.free_blocks, before.steps) == (8, 8, 0)
    assert before.hit_rate == before.fragmentation == 0.0
    stream = llm.stream("x" * 69, max_tokens=10)
    next(stream)
    during = llm.stats()
    assert (during.used_blocks, during.running, during.waiting) == (3, 1, 0)
    assert during.unfilled_positions == 3 * 32 - 70
    assert during.fragmentation == 26 / 96
    assert (during.prefilled_tokens, during.decoded_tokens, during.steps) == (70, 0, 2)
    list(stream)
    llm.generate("x" * 69, max_tokens=1)
    after = llm.stats()
    assert (after.used_blocks, after.cached_blocks, after.free_blocks) == (0, 2, 6)
    assert (after.prefilled_tokens, after.decoded_tokens) == (70 + 6, 9)
    assert (after.cached_tokens, after.hit_rate) == (64, 64 / 140)
    assert after.steps == len(prompts_seen(llm)) == 12
    assert after.preemptions == 0


def test_repr_says_what_the_model_does_by_default() -> None:
    llm = make_llm(temperature=0.6, top_p=0.9, max_tokens=77)
    assert repr(llm) == (
        "<LLM 'fake' on fake (none, 1 thread), context 256, "
        "defaults: temperature=0.6, top_p=0.9, max_tokens=77, stop_ids=[257]>"
    )
