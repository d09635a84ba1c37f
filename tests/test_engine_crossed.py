"""Everything at once: guesses, adapters, choices, readers that pause, and Ctrl-C before any line.

What a request writes, by text, tokens, log-probabilities and chunks, is what it writes alone, in an
engine with room, without guesses and without a cache.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from bitllm.adapter import Adapter
from bitllm.backends.base import KV_BLOCK_SIZE, OutputKind
from bitllm.engine.draft_model import DraftModel
from bitllm.engine.engine import Choices, Engine
from bitllm.engine.outputs import Chunk
from bitllm.engine.readout import Readout
from bitllm.engine.request import Request, adapted
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Drafter, Speculation
from bitllm.errors import QuantizationError
from drafters import EagerNgrams
from fake_decoder import ADAPTED, FakeDecoder, fake_spec
from test_engine_interrupts import ENGINE, interrupted
from test_engine_schedules import Clock

SPEC = fake_spec(vocab_size=64)
MOST_TOKENS = 160  # of a sequence, prompt and output
NOTHING = Adapter("nothing", {})
NextToken = Callable[[list[int]], int] | None


class Letters:
    """Few letters, so that stop strings and held back text come often."""

    def push(self, token_id: int) -> str:
        return "abcd"[token_id % 4]

    def flush(self) -> str:
        return ""


@dataclass(eq=False)
class Reader:
    """Who asked for something, and what was read of it."""

    request: Request
    choices: Choices
    paused: bool = False
    chunks: dict[Sequence, list[Chunk]] = field(default_factory=dict)

    def read(self) -> None:
        for sequence in self.choices:
            if (chunk := sequence.take_chunk()) is not None:
                self.chunks.setdefault(sequence, []).append(chunk)


class Crossing:
    """Random events on an engine in little room.

    Args:
        seed: of everything random.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        choose = self.random.choice
        rows = choose([2, 7, 40, 64])
        self.next_token: NextToken = choose([None, lambda tokens: (len(tokens) * 7) % 11])
        self.decoder = FakeDecoder(
            blocks=self.random.randint(5, 16),
            max_batch_tokens=rows,
            spec=SPEC,
            next_token=self.next_token,
        )
        second = FakeDecoder(blocks=6, max_batch_tokens=16, spec=SPEC)
        self.model = DraftModel(second, 16, lambda: 0.0)
        drafters: list[Drafter] = [EagerNgrams(), self.model]
        self.clock = Clock()
        self.engine = Engine(
            self.decoder,
            Letters,
            max_batch_tokens=rows,
            prefix_cache=self.random.random() < 0.8,
            speculation=Speculation(
                choose([drafters, drafters[:1], drafters[1:]]), 8, rows, shortest=0.0
            ),
            clock=self.clock,
        )
        one, two = self._tokens(KV_BLOCK_SIZE), self._tokens(KV_BLOCK_SIZE)
        self.prefixes = [(), one[1:], one, one + two, two + one + two]
        self.readers: list[Reader] = []
        self.names = (f"adapter {number}" for number in itertools.count())
        self.reached: Counter[str] = Counter()

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(3), k=count))

    def request(self) -> Request:
        choose = self.random.choice
        prompt = choose(self.prefixes) + self._tokens(choose([1, 5, 33]))
        max_tokens = choose([1, 2, 5, 20, 30, MOST_TOKENS - len(prompt)])
        min_tokens = min(max_tokens, choose([0, 0, 3, 15]))
        stop_ids = frozenset(range(choose([0, 0, 3])))
        scores = Readout(OutputKind.SCORE, 0, len(prompt) - 1, prompt[1:], 1)
        request = Request(
            prompt_ids=prompt,
            max_tokens=max_tokens,
            temperature=choose([0.0, 0.3, 1.0]),
            seed=choose([1, 2]),
            stop_ids=stop_ids,
            stop_strings=choose([(), ("abca", "dd"), ("aaaab",)]),
            banned_ids=stop_ids if min_tokens else frozenset(),
            min_tokens=min_tokens,
            repetition_penalty=choose([1.0, 1.0, 1.3]),
            frequency_penalty=choose([0.0, 0.0, 0.5]),
            presence_penalty=choose([0.0, 0.0, 0.4]),
            logit_bias=choose([{}, {}, {5: 2.0}]),
            top_logprobs=choose([-1, -1, 0, 2]),
            choices=choose([1, 1, 1, 2, 5]),
            readout=choose([None] * 5 + [scores]),
            priority=choose([0, 0, -1, 2]),
            timeout=choose([None, None, None, 0.6]),
            prefix_cache=choose([True, True, False]),
        )
        return adapted(request, choose([None, *self.engine.adapters.values()]))

    def run(self, arrivals: int) -> None:
        """Let this many requests arrive, and go on until none is left."""
        events = {
            self._load: 4,
            self._unload: 3,
            self._leave: 3,
            self._pause_or_resume: 7,
            self._break_off: 3,
            self._step: 50,
        }
        while arrivals or self.readers:
            if arrivals and self.random.random() < 0.3:
                arrivals -= 1
                request = self.request()
                self.readers.append(Reader(request, self.engine.add_choices(request)))
            else:
                self.random.choices(list(events), list(events.values()))[0]()
            self._read()
            self.clock.now += 0.02
        self._check_nothing_is_left()

    def _read(self) -> None:
        for reader in list(self.readers):
            if all(sequence.finished for sequence in reader.choices):
                self._check(reader)
            elif self.random.random() < 0.3:
                reader.read()

    def _load(self) -> None:
        self.engine.load_adapter(next(self.names), NOTHING)

    def _unload(self) -> None:
        if names := list(self.engine.adapters):
            self.engine.unload_adapter(self.random.choice(names))
            self.reached["unloaded"] += 1

    def _leave(self) -> None:
        if self.readers:
            reader = self.readers.pop(self.random.randrange(len(self.readers)))
            if self.random.random() < 0.5:  # else they are forgotten
                for sequence in reader.choices:
                    self.engine.abort(sequence)

    def _pause_or_resume(self) -> None:
        """As a reader does who is behind, and so has been given something."""
        if not self.readers:
            return
        reader = self.random.choice(self.readers)
        if not reader.paused and not any(each.generated for each in reader.choices):
            return
        self.reached["paused"] += not reader.paused
        for sequence in reader.choices:
            (self.engine.resume if reader.paused else self.engine.pause)(sequence)
        reader.paused = not reader.paused

    def _step(self) -> None:
        self.engine.advance()
        self._check_blocks()

    def _break_off(self) -> None:
        """By Ctrl-C before any line, or a guess that overflows the model."""
        if self.random.random() < 0.7:
            line = self.random.randint(1, 1500)
            self.reached["interrupts"] += interrupted(
                self.engine.advance, line, sys.maxsize, ENGINE
            )
            return
        self.decoder.on_step = self._overflow
        self.engine.advance()
        self.decoder.on_step = lambda: None

    def _overflow(self) -> None:
        batch = self.decoder.steps[-1]
        if batch.positions[0] >= KV_BLOCK_SIZE and self._guesses(batch.token_ids.tolist()):
            self.decoder.on_step = lambda: None
            self.reached["overflows"] += 1
            raise QuantizationError("a wrong guess")

    def _guesses(self, tokens: list[int]) -> bool:
        known = sum(each.pending for each in self.engine._scheduler.running)
        return len(tokens) > known

    def _check(self, reader: Reader) -> None:
        self.readers.remove(reader)
        reader.read()
        alone = self._alone(reader.request)
        for sequence, wanted in zip(reader.choices, alone, strict=True):
            written = outcome(sequence)
            if sequence.finish_reason == "timeout":
                assert reader.request.timeout is not None
                assert wanted["token_ids"][: sequence.generated] == written["token_ids"]
                self.reached["timeouts"] += 1
            else:
                assert written == wanted
            chunks = reader.chunks[sequence]
            assert "".join(each.text for each in chunks) == written["text"]
            assert sum((each.token_ids for each in chunks), ()) == written["token_ids"]
            if written["logprobs"] is not None:
                assert sum((each.logprobs or () for each in chunks), ()) == written["logprobs"]
            self.engine.abort(sequence)

    def _alone(self, request: Request) -> list[dict[str, Any]]:
        decoder = FakeDecoder(
            blocks=64, max_batch_tokens=512, spec=SPEC, next_token=self.next_token
        )
        engine = Engine(decoder, Letters, max_batch_tokens=512, prefix_cache=False)
        request = replace(request, timeout=None)
        if request.adapter is not None:
            decoder._loads = number_of(request) - 1  # so that it adds the same
            engine.load_adapter("the same", NOTHING)
            request = adapted(request, engine.adapters["the same"])
        choices = engine.add_choices(request)
        for sequence in choices:
            engine.finish(sequence)
        return [outcome(sequence) for sequence in choices]

    def _check_blocks(self) -> None:
        """Each block is held by just those sequences that read it, with their keys and values."""
        pool, running = self.engine._pool, self.engine._scheduler.running
        held = Counter(block for sequence in running for block in sequence.block_ids)
        assert [held[block] for block in range(pool.capacity)] == pool._holders
        assert sorted([*pool._free, *pool._idle, *held]) == list(range(pool.capacity))
        for sequence in running:
            added = ADAPTED * number_of(sequence.request)
            stored = self.decoder._cache[sequence.block_ids].reshape(-1)[: sequence.computed]
            known = sequence.token_ids[: sequence.computed]
            assert stored.tolist() == [token + added for token in known]

    def _check_nothing_is_left(self) -> None:
        for name in self.engine.adapters:
            self.engine.unload_adapter(name)
        self.engine._settle()
        engine, stats = self.engine, self.engine.stats()
        assert stats.used_blocks == stats.running == stats.waiting == 0
        assert not self.decoder.adapters
        assert engine._held == set()
        assert engine._deadlines == engine._owners == self.model._shadows == {}
        self.reached["hits"] += stats.cached_tokens
        self.reached["preemptions"] += stats.preemptions
        self.reached["right guesses"] += stats.accepted_tokens
        self.reached["wrong guesses"] += stats.drafted_tokens - stats.accepted_tokens


def number_of(request: Request) -> int:
    """What the fake decoder adds for the adapter of a request: the number of its load."""
    return 0 if request.adapter is None else int(request.adapter.key.split()[1]) + 1


def outcome(sequence: Sequence) -> dict[str, Any]:
    """Everything that a sequence has written."""
    done = sequence.completion()
    names = ("text", "token_ids", "finish_reason", "logprobs", "prompt_logprobs")
    return {name: getattr(done, name) for name in names}


def cross(seeds: range) -> Counter[str]:
    reached: Counter[str] = Counter()
    for seed in seeds:
        crossing = Crossing(seed)
        crossing.run(10)
        reached += crossing.reached
    return reached


def test_whatever_comes_together_each_writes_what_it_would_alone() -> None:
    reached = cross(range(24))
    for what in ("unloaded", "paused", "interrupts", "overflows", "timeouts", "hits"):
        assert reached[what] > 0, what
    for what in ("preemptions", "right guesses", "wrong guesses"):
        assert reached[what] > 0, what


@pytest.mark.slow
def test_many_that_come_together() -> None:
    cross(range(1000, 1250))
