"""What the engine keeps while it runs: nothing that grows with the number of steps."""

from __future__ import annotations

import gc
import itertools
import tracemalloc

import numpy as np
import pytest

from bitllm.backends.base import Batch, StepOutput
from bitllm.engine.engine import Choices, Engine
from bitllm.engine.request import Request
from fake_decoder import FakeDecoder

LETTERS = 97


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Constant(FakeDecoder):
    """Draws ids by their places alone, and keeps nothing."""

    def forward(self, batch: Batch) -> StepOutput:
        count = len(batch.plan)
        drawn = (batch.plan.position * 31 % 200).astype(np.int32)
        none = np.zeros((0, 0), np.float32)
        return StepOutput(
            none, none, drawn, np.zeros(count, np.float32), none.astype(np.int32), none
        )


class Writers:
    """Four texts of up to 400 tokens, each with a penalty; one that ends is begun again."""

    def __init__(self) -> None:
        self.engine = Engine(Constant(blocks=64), NoText, max_batch_tokens=64)
        self.numbers = itertools.count()
        self.texts: list[Choices] = []
        self.broken: list[Choices] = []  # what a leak of sequences would look like

    def steps(self, count: int, leak: bool) -> None:
        for _ in range(count):
            while len(self.texts) < 4:
                index = next(self.numbers) % 50
                self.texts.append(
                    self.engine.add_choices(
                        Request(
                            prompt_ids=(index, 1, 2),
                            max_tokens=400,
                            repetition_penalty=1.1,
                            timeout=1e6,
                        )
                    )
                )
            self.engine.advance()
            for ended in [each for each in self.texts if each[0].finished]:
                self.texts.remove(ended)
                self.engine.abort(ended[0])
                if leak:
                    self.broken.append(ended)


def growth(steps: int, leak: bool) -> int:
    """Return by how many bytes memory has grown in so many steps, after a warm-up as long."""
    writers = Writers()
    tracemalloc.start()
    try:
        held = []
        for _ in range(2):
            writers.steps(steps, leak)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return held[1] - held[0]
    finally:
        tracemalloc.stop()


def test_a_leak_would_be_seen() -> None:
    assert growth(1600, leak=True) > 100_000


def test_steps_leave_nothing_behind() -> None:
    assert growth(1600, leak=False) < 20_000


@pytest.mark.slow
def test_ten_thousand_steps_leave_nothing_behind() -> None:
    assert growth(10_000, leak=False) < 20_000
