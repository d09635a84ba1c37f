"""The step loop on a fake decoder: many at once is the same as one by one."""

from __future__ import annotations

import codecs
import dataclasses
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitllm.engine.engine import Engine
from bitllm.engine.outputs import Completion
from bitllm.engine.request import Request
from bitllm.errors import CheckpointError, ConfigError, ContextOverflowError
from fake_decoder import FakeDecoder

END = 257


class Bytes:
    """A detokenizer whose ids are bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def make_engine(decoder: FakeDecoder | None = None, **options: Any) -> tuple[Engine, FakeDecoder]:
    decoder = FakeDecoder(**options) if decoder is None else decoder
    return Engine(decoder, Bytes, max_batch_tokens=decoder.max_batch_tokens), decoder


def complete(engine: Engine, requests: list[Request]) -> list[Completion]:
    sequences = [engine.add(request) for request in requests]
    for sequence in sequences:
        engine.finish(sequence)
        engine.abort(sequence)
    return [sequence.completion() for sequence in sequences]


def same(one: Completion, other: Completion) -> bool:
    parts = [
        (each.text, each.token_ids, each.finish_reason, each.logprobs) for each in (one, other)
    ]
    return parts[0] == parts[1]


def request(prompt: str = "hello", max_tokens: int = 8, **options: Any) -> Request:
    return Request(prompt_ids=tuple(prompt.encode()), max_tokens=max_tokens, **options)


def script(text: str | bytes, end: bool = True) -> Any:
    """Return a `next_token` that writes a text after a prompt of 5 tokens, then the end."""
    data = text.encode() if isinstance(text, str) else text
    ids = [*data, END] if end else list(data)
    return lambda tokens: ids[(len(tokens) - 5) % len(ids)]


def test_greedy_text_is_the_argmax_of_all_tokens_before() -> None:
    engine, decoder = make_engine()
    (result,) = complete(engine, [request(max_tokens=40)])
    tokens = list(b"hello")
    for _ in range(40):
        tokens.append(int(np.argmax(decoder.logits(tokens))))
    assert result.token_ids == tuple(tokens[5:])
    assert result.finish_reason == "length"
    assert engine.free_blocks == 8


def test_stop_id_ends_the_text_and_is_counted() -> None:
    engine, _ = make_engine(next_token=script("abc"))
    (result,) = complete(engine, [request(stop_ids=frozenset({END}))])
    assert (result.text, result.finish_reason) == ("abc", "stop")
    assert result.token_ids == (*b"abc", END)
    assert result.usage.completion_tokens == 4
    assert engine.free_blocks == 8


def test_stop_string_across_tokens() -> None:
    engine, _ = make_engine(next_token=script("one. two"))
    (result,) = complete(engine, [request(stop_strings=(". t",), max_tokens=30)])
    assert (result.text, result.finish_reason) == ("one", "stop")
    assert result.token_ids == tuple(b"one. t")


def test_half_a_character_at_the_end_is_replaced() -> None:
    engine, _ = make_engine(next_token=script("aé"))
    (result,) = complete(engine, [request(max_tokens=2)])
    assert result.text == "a�"


def test_min_tokens_forbids_stop_ids_and_ignores_stop_strings() -> None:
    engine, decoder = make_engine(next_token=lambda tokens: END if len(tokens) == 5 else 97)
    asked = request(
        stop_ids=frozenset({END}),
        banned_ids=frozenset({END}),
        stop_strings=("a",),
        min_tokens=3,
    )
    (result,) = complete(engine, [asked])
    logits = decoder.logits(list(b"hello"))
    logits[END] = -np.inf
    assert result.token_ids == (int(np.argmax(logits)), 97, 97)
    assert result.finish_reason == "stop"
    assert [int(batch.plan.mask_rows[0]) for batch in decoder.steps] == [0, 0, 0]
    (after,) = complete(engine, [request(stop_ids=frozenset({END}), banned_ids=frozenset({END}))])
    assert after.token_ids == (END,)


def test_penalties_see_the_prompt_and_count_the_output() -> None:
    engine, decoder = make_engine(next_token=lambda tokens: 120)
    complete(engine, [request("abca", max_tokens=3, frequency_penalty=0.25)])
    plans = [batch.plan for batch in decoder.steps]
    assert [plan.seen_ids.tolist() for plan in plans] == [[97, 98, 99], *[[97, 98, 99, 120]] * 2]
    assert [plan.seen_counts.tolist() for plan in plans] == [[0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert plans[0].frequency_penalty.tolist() == [0.25]


def test_presence_penalty_turns_the_choice() -> None:
    engine, decoder = make_engine(next_token=lambda tokens: 120)
    (result,) = complete(engine, [request(max_tokens=3, presence_penalty=100.0)])
    assert result.token_ids.count(120) == 1
    assert decoder.steps[0].plan.seen_offsets.tolist() == [0, 4]


def test_bias_reaches_the_decoder() -> None:
    engine, decoder = make_engine()
    (result,) = complete(engine, [request(max_tokens=2, logit_bias={65: 99.0, 66: 1.0})])
    assert result.text == "AA"
    assert decoder.steps[0].plan.bias_offsets.tolist() == [0, 2]


def test_logprobs_are_of_the_drawn_token_and_the_likeliest() -> None:
    engine, decoder = make_engine()
    asked = request(max_tokens=3, top_logprobs=2, temperature=2.0, seed=5)
    (result,) = complete(engine, [asked])
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    raw = decoder.logits(list(b"hello"))
    expected = raw - np.log(np.exp(raw).sum())
    first = result.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token_id], rel=1e-6)
    assert [token for token, _ in first.top] == np.argsort(-raw)[:2].tolist()
    assert first.top[0][1] == pytest.approx(expected.max(), rel=1e-6)


def test_logprobs_of_neighbours_do_not_mix() -> None:
    engine, _ = make_engine(blocks=32)
    plain, wide, narrow = complete(
        engine, [request("aaaaa"), request(top_logprobs=3), request("bbbbb", top_logprobs=0)]
    )
    assert plain.logprobs is None
    assert wide.logprobs is not None
    assert [len(entry.top) for entry in wide.logprobs] == [3] * 8
    assert narrow.logprobs is not None
    assert [entry.top for entry in narrow.logprobs] == [()] * 8


def test_seed_and_position_decide_the_draw() -> None:
    engine, decoder = make_engine()
    first, again, other = complete(
        engine,
        [request(temperature=1.0, seed=seed, max_tokens=20) for seed in (1, 1, 2)],
    )
    assert [batch.plan.position.tolist() for batch in decoder.steps] == [[n] * 3 for n in range(20)]
    assert decoder.steps[0].plan.seed.tolist() == [1, 1, 2]
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids
    assert (first.seed, other.seed) == (1, 2)
    (greedy,) = complete(engine, [request()])
    assert greedy.seed is None


requests = st.builds(
    lambda prompt, max_tokens, temperature, seed, stops, penalty, top: Request(
        prompt_ids=tuple(prompt),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_ids=frozenset(stops),
        repetition_penalty=penalty,
        top_logprobs=top,
    ),
    prompt=st.lists(st.integers(0, 257), min_size=1, max_size=100),
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    seed=st.integers(0, 2**64 - 1),
    stops=st.lists(st.integers(0, 257), max_size=20),
    penalty=st.sampled_from([1.0, 1.3]),
    top=st.integers(-1, 2),
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=6), st.integers(5, 12), st.sampled_from([1, 3, 17, 64])
)
def test_together_is_as_one_by_one(asked: list[Request], blocks: int, rows: int) -> None:
    """However few blocks and rows a step has: preemption and chunking leave no trace."""
    roomy, _ = make_engine(blocks=64, max_batch_tokens=512)
    alone = [complete(roomy, [each])[0] for each in asked]
    tight, decoder = make_engine(blocks=blocks, max_batch_tokens=rows)
    together = complete(tight, asked)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert tight.free_blocks == blocks
    for batch in decoder.steps:
        used = batch.block_tables[batch.block_tables >= 0]
        assert len(set(used.tolist())) == len(used), "two sequences write to one block"


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=12),
    st.lists(st.text(min_size=1, max_size=3), max_size=2),
    st.integers(1, 30),
)
def test_chunks_joined_are_the_completion(text: str, stops: list[str], max_tokens: int) -> None:
    engine, _ = make_engine(next_token=script(text))
    asked = request(
        max_tokens=max_tokens,
        stop_ids=frozenset({END}),
        stop_strings=tuple(stops),
        top_logprobs=1,
    )
    (whole,) = complete(engine, [asked])
    sequence = engine.add(asked)
    chunks = list(iter(lambda: engine.next_chunk(sequence), None))
    engine.abort(sequence)
    assert "".join(map(str, chunks)) == whole.text == str(whole)
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert sum((chunk.logprobs or () for chunk in chunks), ()) == whole.logprobs
    assert all(chunk.text and chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason == whole.finish_reason
    assert chunks[-1].usage is not None
    assert engine.free_blocks == 8


def test_prompts_are_read_in_pieces_while_others_write() -> None:
    engine, decoder = make_engine(blocks=32, max_batch_tokens=8)
    short = engine.add(request("ab", max_tokens=6))
    engine.next_chunk(short)
    long = engine.add(request("x" * 20, max_tokens=1))
    engine.finish(long)
    shapes = [np.diff(batch.run_offsets).tolist() for batch in decoder.steps]
    assert [1, 7] in shapes
    assert all(sum(shape) <= 8 for shape in shapes)
    assert sum(shape[-1] for shape in shapes if len(shape) == 2) == 20
    for sequence in (short, long):
        engine.abort(sequence)
    assert engine.free_blocks == 32


def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    engine, decoder = make_engine(blocks=4)
    old, young = (engine.add(request(c * 30, max_tokens=90)) for c in "ab")
    engine.finish(old)
    assert old.generated == 90
    assert young.generated < 90
    lengths = [np.diff(batch.run_offsets).tolist() for batch in decoder.steps]
    assert [1] in lengths  # the old one alone, after the young one lost its blocks
    engine.abort(old)
    engine.finish(young)
    assert young.generated == 90
    engine.abort(young)
    assert engine.free_blocks == 4


def test_abort_frees_blocks_at_once() -> None:
    engine, _ = make_engine()
    sequence = engine.add(request("x" * 60))
    engine.next_chunk(sequence)
    assert engine.free_blocks < 8
    engine.abort(sequence)
    assert engine.free_blocks == 8
    engine.abort(sequence)  # harmless


def test_an_interrupted_step_leaves_the_engine_usable() -> None:
    engine, decoder = make_engine()
    plain = complete(engine, [request(max_tokens=12)])[0]
    survivor = engine.add(request(max_tokens=12))
    engine.next_chunk(survivor)
    sequence = engine.add(request("y" * 70))

    def interrupt() -> None:
        decoder.on_step = lambda: None
        raise KeyboardInterrupt

    decoder.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.finish(sequence)
    engine.abort(sequence)
    assert engine.free_blocks == 8
    engine.finish(survivor)
    engine.abort(survivor)
    assert same(survivor.completion(), plain)
    assert engine.free_blocks == 8


def test_a_stream_collected_in_the_middle_of_a_step() -> None:
    """The garbage collector may run anything anywhere; also an abort inside `forward`."""
    engine, decoder = make_engine()
    doomed = engine.add(request("x" * 40))
    engine.next_chunk(doomed)
    decoder.on_step = lambda: engine.abort(doomed)
    complete(engine, [request()])
    assert engine.free_blocks == 8


def test_threads_share_the_steps() -> None:
    asked = [request(c * 20, max_tokens=25) for c in "abcdef"]
    alone = [complete(make_engine(blocks=64)[0], [each])[0] for each in asked]
    engine, _ = make_engine(blocks=64)
    results: dict[int, Completion] = {}
    start = threading.Barrier(len(asked))

    def work(index: int) -> None:
        start.wait()
        results[index] = complete(engine, [asked[index]])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(results[index], one) for index, one in enumerate(alone))
    assert engine.free_blocks == 64


def test_a_closed_engine_says_so() -> None:
    engine, decoder = make_engine()
    sequence = engine.add(request())
    engine.close()
    engine.close()
    assert decoder.closed
    for act in (lambda: engine.add(request()), lambda: engine.finish(sequence)):
        with pytest.raises(ConfigError, match="closed"):
            act()
    with pytest.raises(ConfigError, match="closed"):
        engine.next_chunk(sequence)
    engine.abort(sequence)


def test_a_request_that_the_cache_cannot_hold() -> None:
    engine, _ = make_engine(blocks=2)
    with pytest.raises(ContextOverflowError, match=r"need 65 positions .* holds 64"):
        engine.add(request("x" * 60, max_tokens=6))
    (result,) = complete(engine, [request("x" * 60, max_tokens=5)])  # the last is not computed
    assert len(result.token_ids) == 5


def test_waiting_for_a_sequence_that_was_aborted_is_a_bug() -> None:
    engine, _ = make_engine()
    sequence = engine.add(request())
    engine.abort(sequence)
    with pytest.raises(RuntimeError, match="not in the engine"):
        engine.finish(sequence)
    with pytest.raises(RuntimeError, match="has not ended"):
        sequence.completion()


def test_usage_counts_and_times() -> None:
    engine, _ = make_engine()
    (result,) = complete(engine, [request(max_tokens=5)])
    usage = result.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 5)
    assert usage.prefill_seconds > 0
    assert usage.decode_seconds > 0
    assert usage.prompt_tokens_per_second == 5 / usage.prefill_seconds
    assert usage.tokens_per_second == 4 / usage.decode_seconds
    (single,) = complete(engine, [request(max_tokens=1)])
    assert single.usage.tokens_per_second == 0


class Speechless(FakeDecoder):
    """Finds no token for every sequence whose prompt is b"bad", as NaN logits do."""

    def forward(self, batch: Any) -> Any:
        output = super().forward(batch)
        first = [chr(batch.token_ids[row]) for row in batch.run_offsets[:-1]]
        bad = [letter == "b" for letter in first]
        sampled = np.where(bad, -1, output.sampled).astype(np.int32)
        return dataclasses.replace(output, sampled=sampled)


def test_a_sequence_without_a_token_to_draw_fails_alone() -> None:
    (wanted,) = complete(make_engine()[0], [request(max_tokens=20)])
    engine, _ = make_engine(Speechless())
    good = engine.add(request(max_tokens=20))
    damaged = engine.add(request("bad"))
    banned = engine.add(
        request("bad", banned_ids=frozenset(range(258)), min_tokens=2, top_logprobs=1)
    )
    engine.finish(good)
    assert same(good.completion(), wanted)
    for wait in (engine.finish, engine.next_chunk):
        with pytest.raises(CheckpointError, match="no number for any token after 3 tokens"):
            wait(damaged)
        with pytest.raises(ConfigError, match="min_tokens=2 forbids the 258 ids"):
            wait(banned)
    for sequence in (good, damaged, banned):
        engine.abort(sequence)
    assert engine.free_blocks == 8


def test_an_abort_that_waits_for_the_lock_leaves_nothing_to_do() -> None:
    engine, decoder = make_engine()
    sequence = engine.add(request())
    engine.hold()
    leaving = threading.Thread(target=engine.abort, args=(sequence,), daemon=True)
    leaving.start()
    while not engine._aborted:
        time.sleep(0.001)
    assert not engine.advance()
    engine.let_go()
    leaving.join()
    assert (len(decoder.steps), engine.free_blocks) == (0, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_during_a_step_leaves_the_child_an_engine_that_works() -> None:
    engine, decoder = make_engine()
    (wanted,) = complete(engine, [request()])
    stepping, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        stepping.set()
        go_on.wait(0.2)  # time for the other thread to try to fork

    decoder.on_step = wait
    busy = threading.Thread(target=complete, args=(engine, [request("other", max_tokens=2)]))
    busy.start()
    stepping.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        decoder.on_step = lambda: None
        os._exit(0 if same(complete(engine, [request()])[0], wanted) else 1)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
    busy.join()
    assert same(complete(engine, [request()])[0], wanted)


def test_stats_of_an_idle_engine_leave_out_what_nobody_holds() -> None:
    engine, _ = make_engine()
    choices = engine.add_choices(Request(prompt_ids=(1, 2, 3), max_tokens=9))
    engine.advance()
    assert engine.stats().running == 1
    del choices
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_stats_do_not_wait_for_a_step() -> None:
    engine, _ = make_engine()
    choices = engine.add_choices(Request(prompt_ids=(1, 2, 3), max_tokens=9))
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        engine.hold()
        holding.set()
        done.wait(30)
        engine.let_go()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert holding.wait(30)
        del choices
        assert engine.stats().waiting == 1  # as it was: this thread may not change it now
    finally:
        done.set()
        thread.join()
    assert engine.stats().waiting == 0
