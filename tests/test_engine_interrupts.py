"""Ctrl-C before any line of the engine: no block is lost, and no text of anybody else changes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import bitllm.engine
from bitllm import LLM
from bitllm.config import SamplingParams
from bitllm.engine.engine import Choices
from bitllm.engine.request import ModelDefaults
from byte_tokenizer import END, byte_tokenizer
from fake_decoder import FakeDecoder

BLOCKS = 12
TOKENIZER = byte_tokenizer()
FOLDER = str(Path(bitllm.engine.__file__).parent)
# What happens before the engine has a request changes nothing.
FILES = {
    f"{FOLDER}/{name}.py"
    for name in ("batch", "blocks", "engine", "llm", "readout", "scheduler", "seen", "sequence")
} | {f"{FOLDER}/text.py"}
ENGINE = {str(path) for path in Path(FOLDER).glob("*.py")}


class InterruptAt:
    """Raises KeyboardInterrupt before one line of the engine, counted in order of execution.

    Args:
        line: which one.
        visits: a line counts so many times at most.
        files: where lines are counted.
    """

    def __init__(self, line: int, visits: int, files: Collection[str]) -> None:
        self.left = line
        self._visits = visits
        self._files = files
        self._seen: Counter[tuple[str, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            here = (frame.f_code.co_filename, frame.f_lineno)
            self._seen[here] += 1
            self.left -= self._seen[here] <= self._visits
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def interrupted(
    act: Callable[[], object], line: int, visits: int, files: Collection[str] = FILES
) -> bool:
    """Do something that is interrupted at a line; return whether it was that long."""
    outer = sys.gettrace()
    sys.settrace(InterruptAt(line, visits, files))
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


def make_llm() -> LLM:
    decoder = FakeDecoder(blocks=BLOCKS, next_token=lambda tokens: 97 + len(tokens) % 7)
    return LLM(
        decoder,
        TOKENIZER,
        name="fake",
        context=256,
        max_batch_tokens=64,
        defaults=ModelDefaults(stop_ids=frozenset({END})),
    )


PARAMS = SamplingParams(
    max_tokens=8,
    repetition_penalty=1.3,
    logprobs=1,
    stop=["efgabX", "zz"],  # so that text is held back
    ignore_eos=True,
)


def begin(llm: LLM) -> tuple[Choices, str]:
    """Return the choices of a request that writes, and what it has shown."""
    choices = llm.engine.add_choices(llm.prepare("x" * 30, PARAMS))
    chunk = llm.engine.next_chunk(*choices)
    assert chunk is not None
    return choices, chunk.text


def complete(llm: LLM, choices: Choices, text: str) -> tuple[Any, ...]:
    """Return everything that a request has written, read to its end."""
    while (chunk := llm.engine.next_chunk(*choices)) is not None:
        text += chunk.text
    (sequence,) = choices
    done = sequence.completion()
    llm.engine.abort(sequence)
    return text, done.text, done.token_ids, done.logprobs, done.finish_reason


def generate(llm: LLM) -> object:
    return llm.generate(["y" * 31], n=2, max_tokens=2, presence_penalty=0.5, timeout=1e6)


def leave_a_stream(llm: LLM) -> None:
    stream = llm.stream("y" * 40, max_tokens=50)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def never_begin(llm: LLM) -> None:
    llm.stream("y", max_tokens=50)


def score(llm: LLM) -> object:
    return llm.score("ab", ["cd", "e" * 33])


acts = pytest.mark.parametrize("act", [generate, leave_a_stream, never_begin, score])


@acts
def test_an_interrupt_before_any_line(act: Callable[[LLM], object]) -> None:
    check_all_lines(act, visits=1)


@pytest.mark.slow
@acts
def test_an_interrupt_at_any_time(act: Callable[[LLM], object]) -> None:
    """Before any line, however often it has been passed."""
    check_all_lines(act, visits=sys.maxsize)


def check_all_lines(act: Callable[[LLM], object], visits: int) -> None:
    """After each interrupt the other request goes on, all blocks come back, and `act` succeeds."""
    plain = make_llm()
    wanted, wanted_act = complete(plain, *begin(plain)), act(plain)
    line = 0
    while True:
        line += 1
        llm = make_llm()
        choices, text = begin(llm)
        if not interrupted(lambda llm=llm: act(llm), line, visits):  # type: ignore[misc]
            break
        assert complete(llm, choices, text) == wanted, line
        stats = llm.stats()
        held = (stats.used_blocks, stats.running, stats.waiting)
        assert held == (0, 0, 0), line
        assert not llm.engine._deadlines, line
        if line % 10 == 0:
            again = act(llm)
            assert repr_of(again) == repr_of(wanted_act), line
        llm.close()
    assert line > (5 if act is never_begin else 100)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_interrupt_while_a_leader_leaves(steps: int) -> None:
    """Whoever relied on it to read the prompt, reads it then."""
    plain = make_llm().generate("x" * 90, params=PARAMS)
    line = 0
    while True:
        line += 1
        llm = make_llm()
        request = llm.prepare("x" * 90, replace(PARAMS, n=3))
        choices = llm.engine.add_choices(request)
        for _ in range(steps):
            llm.engine.advance()
        if not interrupted(lambda llm=llm, one=choices[0]: llm.engine.abort(one), line, 9):  # type: ignore[misc]
            break
        for sequence in choices[1:]:
            llm.engine.finish(sequence)
            assert sequence.completion().token_ids == plain.token_ids, line
        del choices, sequence
        llm.generate("y", max_tokens=1)
        stats = llm.stats()
        assert (stats.used_blocks, stats.running, stats.waiting) == (0, 0, 0), line
        llm.close()
    assert line > 20


def repr_of(result: Any) -> Any:
    """What a call has given, without times."""
    if isinstance(result, list):
        return [repr_of(each) for each in result]
    return getattr(result, "token_ids", result)
