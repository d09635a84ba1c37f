"""Random schedules: whoever comes, goes and gives way, each text is as it would be alone."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitllm import _native
from bitllm.backends import get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, Decoder, LoadOptions, SamplePlan
from bitllm.engine.draft_model import DraftModel
from bitllm.engine.engine import Choices, Engine
from bitllm.engine.request import Request
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Drafter, Speculation
from drafters import EagerNgrams, Guesses
from fake_decoder import FakeDecoder, draw, fake_spec
from synthetic import random_checkpoint, tiny_spec

SPEC = fake_spec(vocab_size=64)
MOST_TOKENS = 160  # of a sequence, prompt and output
REAL = tiny_spec(max_context=MOST_TOKENS)
MakeEngine = Callable[..., Engine]


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Clock:
    """Seconds that pass only when somebody says so."""

    now = 1.0

    def __call__(self) -> float:
        return self.now


class Schedule:
    """Requests that come and go at random on a decoder with few blocks.

    Args:
        seed: of everything random.
        blocks: KV blocks; 5 hold the longest sequence.
        rows: most rows of a step.
        prefix_cache: as in `EngineOptions`.
        drafter: who guesses at coming tokens: a name of `DRAFTERS`.
        checked: which part of the texts is compared with what it should be.
    """

    def __init__(
        self,
        seed: int,
        blocks: int,
        rows: int,
        prefix_cache: bool,
        drafter: str = "none",
        checked: float = 1.0,
    ) -> None:
        self.checked = checked
        self.random = random.Random(seed)
        self.decoder = FakeDecoder(blocks=blocks, max_batch_tokens=rows, spec=SPEC)
        self.clock = Clock()
        self.engine = Engine(
            self.decoder,
            NoText,
            max_batch_tokens=rows,
            prefix_cache=prefix_cache,
            speculation=Speculation(DRAFTERS[drafter](self.random), 8, rows, shortest=0.0),
            clock=self.clock,
        )
        one, two, three = (self._tokens(KV_BLOCK_SIZE) for _ in range(3))
        self.prefixes = [(), one[1:], one, one + two, three + two, one + three + two]
        self.live: list[Sequence] = []
        self.owners: dict[Sequence, Choices] = {}  # who is forgotten leaves the engine

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(3), k=count))

    def request(self) -> Request:
        choose = self.random.choice
        prompt = choose(self.prefixes) + self._tokens(choose([0, 1, 1, 5, 33]))
        prompt = prompt or (1,)
        return Request(
            prompt_ids=prompt,
            max_tokens=choose([1, 2, 5, 20, MOST_TOKENS - len(prompt)]),
            temperature=choose([0.0, 1.0]),
            seed=choose([1, 2]),
            stop_ids=frozenset(range(choose([0, 3]))),
            choices=choose([1, 1, 1, 2, 5]),
            priority=choose([0, 0, 0, -1, 2]),
            timeout=choose([None, None, None, 0.5]),
            prefix_key=choose([b"", b"", b"other"]),
            prefix_cache=choose([True, True, False]),
        )

    def run(self, arrivals: int) -> None:
        """Let this many requests arrive, and go on until none is left."""
        while arrivals or self.live:
            if arrivals and self.random.random() < 0.4:
                arrivals -= 1
                choices = self.engine.add_choices(self.request())
                self.live += choices
                self.owners.update(dict.fromkeys(choices, choices))
            elif self.live and self.random.random() < 0.05:
                self._leave(self.random.choice(self.live))
            elif self.live:
                self._step(self.random.choice(self.live))
            self.clock.now += 0.05

    def _step(self, waited_for: Sequence) -> None:
        if self.random.random() < 0.01:
            self._break_off(waited_for)
        elif not waited_for.finished:
            generated = waited_for.generated
            while not waited_for.finished and waited_for.generated == generated:
                self.engine._step()
                self.check_blocks()
        for sequence in [each for each in self.live if each.finished]:
            self._leave(sequence)

    def _break_off(self, waited_for: Sequence) -> None:
        def interrupt() -> None:
            self.decoder.on_step = lambda: None
            raise KeyboardInterrupt

        self.decoder.on_step = interrupt
        if not waited_for.finished:
            with contextlib.suppress(KeyboardInterrupt):  # no step if its time is up before
                self.engine.finish(waited_for)
        self.decoder.on_step = lambda: None

    def _leave(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        del self.owners[sequence]
        self.engine.abort(sequence)
        if self.random.random() < self.checked:
            check(sequence)

    def check_blocks(self) -> None:
        """Each block is held by just those sequences that read it, or can be had."""
        pool, running = self.engine._pool, self.engine._scheduler.running
        held = Counter(block for sequence in running for block in sequence.block_ids)
        assert [held[block] for block in range(pool.capacity)] == pool._holders
        others = [*pool._free, *pool._idle]
        assert sorted([*others, *held]) == list(range(pool.capacity))
        for sequence in running:
            table = sequence.block_table(len(sequence.block_ids)).tolist()
            assert table == sequence.block_ids
            stored = self.decoder._cache[sequence.block_ids].reshape(-1)[: sequence.computed]
            assert stored.tolist() == sequence.token_ids[: sequence.computed]


def true_token(sequence: Sequence, tokens: Ordered[int]) -> int:
    """Return the token that the sequence draws after these."""
    asked, at = sequence.request, len(tokens) - sequence.prompt_length
    return next_token(bytes(tokens), asked.temperature, asked.seed, sequence.choice, at)


def mostly_right(random: random.Random) -> list[Drafter]:
    """Guesses of random number, of which four of five are true."""

    def guess(sequence: Sequence, tokens: list[int]) -> int:
        if random.random() < 0.2:
            return random.randrange(SPEC.vocab_size)
        return true_token(sequence, tokens)

    return [Guesses(guess, lambda most: random.randint(0, most))]


def another_model(random: random.Random) -> list[Drafter]:
    """A second model that is the same, in little room and small steps."""
    decoder = FakeDecoder(blocks=6, max_batch_tokens=16, spec=SPEC)
    return [DraftModel(decoder, 16, lambda: 0.0)]


DRAFTERS: dict[str, Callable[[random.Random], list[Drafter]]] = {
    "none": lambda random: [],
    "ngrams": lambda random: [EagerNgrams()],
    "mostly right": mostly_right,
    "model": another_model,
    "ngrams, or model": lambda random: [EagerNgrams(), *another_model(random)],
}


@lru_cache(maxsize=10_000)
def next_token(tokens: bytes, temperature: float, seed: int, choice: int, at: int) -> int:
    plan = dataclasses.replace(
        SamplePlan.greedy(1),
        temperature=np.array([temperature], np.float32),
        seed=np.array([seed], np.uint64),
        choice=np.array([choice], np.int32),
        position=np.array([at], np.int32),
    )
    return draw(FakeDecoder(spec=SPEC).logits(list(tokens)), plan, 0)


def check(sequence: Sequence) -> None:
    """The text of a sequence is what its request says, without an engine."""
    asked = sequence.request
    tokens = list(asked.prompt_ids)
    for _ in range(sequence.generated):
        tokens.append(true_token(sequence, tokens))
    assert sequence.token_ids == tokens
    if sequence.finish_reason == "length":
        assert sequence.generated == asked.max_tokens
    elif sequence.finish_reason == "stop":
        assert tokens[-1] in asked.stop_ids
    assert sequence.finish_reason != "timeout" or asked.timeout is not None
    assert not asked.stop_ids.intersection(tokens[len(asked.prompt_ids) : -1])


def run_schedule(
    seed: int, arrivals: int, blocks: int, rows: int, prefix_cache: bool, drafter: str
) -> Schedule:
    schedule = Schedule(seed, blocks, rows, prefix_cache, drafter)
    schedule.run(arrivals)
    stats = schedule.engine.stats()
    assert stats.used_blocks == stats.running == stats.waiting == 0
    assert stats.free_blocks + stats.cached_blocks == blocks
    assert schedule.engine._scheduler._waiting == schedule.engine._scheduler._running == []
    assert not schedule.engine._deadlines
    return schedule


shapes = {
    "seed": st.integers(0, 2**32),
    "arrivals": st.integers(1, 12),
    "blocks": st.integers(5, 16),
    "rows": st.sampled_from([1, 2, 7, 40, 64]),
    "prefix_cache": st.booleans(),
    "drafter": st.sampled_from(sorted(DRAFTERS)),
}


@settings(max_examples=100, deadline=None)
@given(**shapes)
def test_every_text_is_the_one_it_would_be_alone(
    seed: int, arrivals: int, blocks: int, rows: int, prefix_cache: bool, drafter: str
) -> None:
    run_schedule(seed, arrivals, blocks, rows, prefix_cache, drafter)


@pytest.mark.slow
@settings(max_examples=2500, deadline=None)
@given(**shapes)
def test_thousands_of_schedules(
    seed: int, arrivals: int, blocks: int, rows: int, prefix_cache: bool, drafter: str
) -> None:
    run_schedule(seed, arrivals, blocks, rows, prefix_cache, drafter)


def test_the_schedules_reach_what_they_are_for() -> None:
    """Preemptions, hits, evictions, copies, timeouts, shared steps and guesses happen in them."""
    reached: Counter[str] = Counter()
    for seed, drafter in zip(range(12), itertools.cycle(sorted(DRAFTERS)), strict=False):
        schedule = Schedule(seed, blocks=8, rows=40, prefix_cache=True, drafter=drafter)
        copy_blocks = schedule.decoder.copy_blocks

        def counted(pairs: np.ndarray, copy_blocks=copy_blocks) -> None:
            reached["copies"] += len(pairs)
            copy_blocks(pairs)

        schedule.decoder.copy_blocks = counted  # type: ignore[method-assign]
        expired = []
        leave = schedule._leave

        def left(sequence: Sequence, leave=leave, expired=expired) -> None:
            expired.append(sequence.finish_reason == "timeout")
            leave(sequence)

        schedule._leave = left  # type: ignore[method-assign]
        schedule.run(20)
        stats = schedule.engine.stats()
        reached["preemptions"] += stats.preemptions
        reached["hits"] += stats.cached_tokens
        reached["timeouts"] += sum(expired)
        reached[f"right guesses, {drafter}"] += stats.accepted_tokens
        reached[f"wrong guesses, {drafter}"] += stats.drafted_tokens - stats.accepted_tokens
        reached["evictions"] += stats.prefilled_tokens // KV_BLOCK_SIZE > stats.cached_blocks
        reached["mixed"] += any(
            len(set(np.diff(batch.run_offsets).tolist())) > 1 for batch in schedule.decoder.steps
        )
    for what in ("copies", "preemptions", "hits", "timeouts"):
        assert reached[what] > 0, what
    for what in ("right guesses, model", "right guesses, mostly right"):
        assert reached[what] > 0, what
    for what in ("wrong guesses, ngrams", "wrong guesses, mostly right"):
        assert reached[what] > 0, what
    assert reached["evictions"] == reached["mixed"] == 12


# --- a real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cpu", "reference"])
def make_real(request: pytest.FixtureRequest) -> MakeEngine:
    backend = get_backend(request.param)
    checkpoint = random_checkpoint(REAL)

    def load(blocks: int, rows: int) -> Decoder:
        options = LoadOptions(
            kv_tokens=blocks * KV_BLOCK_SIZE,
            max_batch_tokens=rows,
            kv_dtype="bf16",
            threads=1 if request.param == "cpu" else None,
        )
        return backend.load(checkpoint, options)

    def make(blocks: int, rows: int, prefix_cache: bool, guesses: bool = False) -> Engine:
        speculation = None
        if guesses:
            # The same weights, rounded elsewhere: right most of the time.
            drafters = [EagerNgrams(), DraftModel(load(6, 40), 40, lambda: 0.0)]
            speculation = Speculation(drafters, 5, rows, shortest=0.0)
        return Engine(
            load(blocks, rows),
            NoText,
            max_batch_tokens=rows,
            prefix_cache=prefix_cache,
            speculation=speculation,
            clock=Clock(),
        )

    return make


def test_log_probabilities_of_a_model_are_the_same_bits(make_real: MakeEngine) -> None:
    """All of them at each token, alone without a cache and together with one in little room.

    Together also with guesses, by n-grams and by a second model.
    """
    asked = [
        dataclasses.replace(request, timeout=None, top_logprobs=REAL.vocab_size)
        for request in (Schedule(seed, 8, 8, True).request() for seed in range(40, 64))
    ]
    asked = [dataclasses.replace(each, max_tokens=min(each.max_tokens, 24)) for each in asked]
    plain = make_real(64, 256, False)
    alone = [complete(plain, [request])[0] for request in asked]
    for guesses in (False, True):
        shared = make_real(9, 40, True, guesses)
        together = complete(shared, asked)
        again = complete(shared, asked)
        for one, other, third in zip(alone, together, again, strict=True):
            assert one == other == third
        stats = shared.stats()
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0
        assert stats.used_blocks == 0
        assert (stats.accepted_tokens > 0) is guesses
        assert (stats.drafted_tokens > stats.accepted_tokens) is guesses


def complete(engine: Engine, requests: list[Request]) -> list[list[Any]]:
    """Return the ids, reasons and log-probabilities of all choices of each request."""
    groups = [engine.add_choices(request) for request in requests]
    results = []
    for group in groups:
        for sequence in group:
            engine.finish(sequence)
        done = [sequence.completion() for sequence in group]
        results.append([(each.token_ids, each.finish_reason, each.logprobs) for each in done])
    for sequence in itertools.chain.from_iterable(groups):
        engine.abort(sequence)
    return results


# --- endurance ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind() -> None:
    """With cancellations, timeouts and interrupts; memory in use stays what it was early on."""
    schedule = Schedule(7, blocks=64, rows=64, prefix_cache=True, checked=0.02)
    schedule.decoder.steps = deque(maxlen=1)  # type: ignore[assignment]
    schedule.run(2000)
    gc.collect()
    before = _native.resident_bytes()
    schedule.run(8000)
    gc.collect()
    assert schedule.engine.stats().used_blocks == 0
    assert _native.resident_bytes() - before < 4_000_000
