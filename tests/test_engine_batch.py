"""What a step asks for: plans that grow with the texts are those that would be made anew."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitllm.backends.base import KV_BLOCK_SIZE, SamplePlan
from bitllm.engine import batch
from bitllm.engine.batch import BatchBuilder, build_plan
from bitllm.engine.request import Request
from bitllm.engine.scheduler import Run
from bitllm.engine.seen import SeenTokens
from bitllm.engine.sequence import Sequence
from test_engine_interrupts import interrupted

VOCAB = 40


class NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def decoding(*prompt: int, **options: Any) -> Sequence:
    sequence = Sequence(Request(prompt_ids=prompt, max_tokens=500, **options), NoText)
    for block in range(-(-(len(prompt) + 500) // KV_BLOCK_SIZE)):
        sequence.add_block(block)
    sequence.computed = len(prompt) - 1
    return sequence


def write(sequence: Sequence, token: int) -> None:
    sequence.append(token, None, 1.0)
    sequence.computed += 1


def same(one: SamplePlan, other: SamplePlan) -> bool:
    return all(
        np.array_equal(getattr(one, each.name), getattr(other, each.name))
        and getattr(one, each.name).dtype == getattr(other, each.name).dtype
        for each in dataclasses.fields(SamplePlan)
    )


KINDS = (
    {},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.25, "temperature": 0.5, "seed": 9},
    {"presence_penalty": 1.0, "min_tokens": 3, "banned_ids": frozenset({7, 33})},
    {"min_tokens": 5, "banned_ids": frozenset({1}), "logit_bias": {3: 1.5}},
)


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    leaves=st.integers(0, 12),
)
def test_a_kept_plan_is_the_one_that_would_be_made_anew(
    kinds: list[dict[str, Any]], tokens: list[int], leaves: int
) -> None:
    """At each step of several texts, also when one of them leaves."""
    sequences = [decoding(1, index, 1, **kind) for index, kind in enumerate(kinds)]
    builder = BatchBuilder(VOCAB)
    for at, token in enumerate(tokens):
        if at == leaves and len(sequences) > 1:
            sequences.pop(0)
        plan = builder.build([Run(each, 1) for each in sequences]).plan
        assert same(plan, build_plan([(each, ()) for each in sequences], VOCAB))
        for index, sequence in enumerate(sequences):
            write(sequence, (token + index) % VOCAB)


def test_a_plan_that_an_interrupt_cut_short_is_not_taken_for_another() -> None:
    """Before any line of the change from two texts to the first piece of a prompt."""
    writing = [Run(decoding(3, 4), 1), Run(decoding(5), 1)]
    reading = [Run(Sequence(Request(prompt_ids=(1,) * 9, max_tokens=1), NoText), 4)]
    reading[0].sequence.add_block(0)
    for line in itertools.count(1):
        builder = BatchBuilder(VOCAB)
        builder.build(writing)
        act = functools.partial(builder.build, reading)
        cut_short = interrupted(act, line, 9, {batch.__file__})
        assert len(builder.build(reading).plan.temperature) == 0, line
        assert len(builder.build(writing).plan.temperature) == 2, line
        if not cut_short:
            break
    assert line > 10


def test_a_plan_given_out_does_not_change() -> None:
    """Whoever keeps a batch, as a decoder may, keeps what it said."""
    sequence = decoding(1, 2, repetition_penalty=1.5)
    builder = BatchBuilder(VOCAB)
    write(sequence, 5)
    first = builder.build([Run(sequence, 1)]).plan
    for token in (5, 6):
        write(sequence, token)
    second = builder.build([Run(sequence, 1)]).plan
    assert (first.seen_ids.tolist(), first.seen_counts.tolist()) == ([1, 2, 5], [0, 0, 1])
    assert (second.seen_ids.tolist(), second.seen_counts.tolist()) == ([1, 2, 5, 6], [0, 0, 2, 1])


@given(
    prompt=st.lists(st.integers(0, 300), max_size=20),
    generated=st.lists(st.integers(0, 300), max_size=200),
)
def test_seen_tokens_count_what_was_generated(prompt: list[int], generated: list[int]) -> None:
    seen = SeenTokens(prompt)
    wanted = dict.fromkeys(prompt, 0)
    for token in generated:
        seen.add(token)
        wanted[token] = wanted.get(token, 0) + 1
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True)) == wanted
    assert seen.ids.tolist() == list(wanted)  # in the order in which they came
    assert seen.ids.dtype == seen.counts.dtype == np.int32


def test_seen_tokens_of_a_long_text() -> None:
    seen = SeenTokens([4])
    for token in [*range(1000), *range(500)]:
        seen.add(token)
    assert seen.ids.tolist() == [4, *(token for token in range(1000) if token != 4)]
    assert seen.counts.tolist() == [2 if token < 500 else 1 for token in seen.ids.tolist()]


@pytest.mark.parametrize("drafts", [(), (3,), (9, 9, 3)])
def test_drafts_are_seen_without_being_written(drafts: tuple[int, ...]) -> None:
    seen, wanted = SeenTokens([1, 2]), SeenTokens([1, 2])
    for token in (3, 3):
        seen.add(token)
        wanted.add(token)
    drafted = seen.after(drafts)
    for token in drafts:
        wanted.add(token)
    assert drafted.ids.tolist() == wanted.ids.tolist()
    assert drafted.counts.tolist() == wanted.counts.tolist()
    assert (seen.ids.tolist(), seen.counts.tolist()) == ([1, 2, 3], [0, 0, 2])


def test_the_short_way_makes_the_same_batch() -> None:
    """Of runs that decode, while tokens are drawn and blocks come, are replaced and go."""
    sequences = [decoding(*range(1, 3 + index), **kind) for index, kind in enumerate(KINDS)]
    short, general = BatchBuilder(VOCAB), BatchBuilder(VOCAB)
    for step in range(2 * KV_BLOCK_SIZE):
        for sequence in sequences:
            write(sequence, 5 + step % 7)
        if step == 5:
            sequences[1].replace_block(0, 33)
        if step == 9:
            sequences[2].drop_last_block()
        if step == 20:
            del sequences[3]
        runs = [Run(sequence, 1) for sequence in sequences]
        assert all(run.decodes for run in runs)
        one, other = short.build_decoding(runs), general.build(runs)
        assert same(one.plan, other.plan), step
        for name in ("token_ids", "positions", "run_offsets", "adapter_slots", "output_rows"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), (step, name)
        assert np.array_equal(one.output_kinds, other.output_kinds)
        used = other.block_tables.shape[1]
        named = other.block_tables >= 0
        assert np.array_equal(one.block_tables[:, :used][named], other.block_tables[named]), step
