"""From scheduled runs to the flat arrays of a `Batch`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from operator import is_not
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import Batch, OutputKind, SamplePlan
from bitllm.engine.readout import Rows
from bitllm.engine.scheduler import Run
from bitllm.engine.sequence import Sequence

__all__ = ["BatchBuilder", "build_plan"]

I32 = npt.NDArray[np.int32]

_NO_IDS = np.zeros(0, np.int32)

Draw = tuple[Sequence, tuple[int, ...]]
"""A sequence, and the guesses between its last known token and the one to draw."""


class BatchBuilder:
    """Turns the scheduled runs of each step into a `Batch`.

    While the same requests decode, most arrays of one step are those of the step before: they are
    kept and given out again, so nobody may write into a batch. What penalties look at and masks are
    of each step; the former are copied from arrays that grow with each text.

    Args:
        vocab_size: width of the token masks.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._planned: list[Sequence] | None = None  # whom the plan is for, None = nobody knows
        self._plan = SamplePlan.greedy()
        self._of_one = _shape([], [])

    def build(self, runs: Ordered[Run]) -> Batch:
        """Return one step's batch.

        Each run asks for its `read_rows`, then for one SAMPLE for each of its `drawers`, or for
        the last known token and each guess after it.

        Args:
            runs: at least one, with blocks for all of their tokens.
        """
        drawers = [run.drawers for run in runs]
        sampling = _draws(runs, drawers)
        reading = [(run.sequence.rows, rows) for run in runs if (rows := run.read_rows)]
        if not reading and all(
            run.length == len(draw) == 1 and not run.draft
            for run, draw in zip(runs, drawers, strict=True)
        ):
            shape = self._shape_of_one(len(runs))
            tokens = [run.sequence.token_ids[run.sequence.computed] for run in runs]
            positions = [run.sequence.computed for run in runs]
        else:
            shape = _shape_of(runs, drawers)
            tokens, positions = [], []
            for run in runs:
                tokens += run.token_ids
                positions += range(run.sequence.computed, run.end)
        return Batch(
            token_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            run_offsets=shape.run_offsets,
            block_tables=_block_tables(runs),
            adapter_slots=_adapter_slots(runs),
            output_rows=shape.output_rows,
            output_kinds=shape.output_kinds,
            plan=self._plan_for(sampling),
            **_scores(reading),
        )

    def _shape_of_one(self, count: int) -> _Shape:
        if len(self._of_one.run_offsets) != count + 1:
            self._of_one = _shape([1] * count, range(count))
        return self._of_one

    def _plan_for(self, draws: list[Draw]) -> SamplePlan:
        sequences, kept = [sequence for sequence, _ in draws], self._planned
        if kept is None or len(kept) != len(sequences) or any(map(is_not, kept, sequences)):
            self._planned = None  # for an interrupt may leave the one without the other
            self._plan = build_plan(draws, self._vocab_size)
            self._planned = sequences
            return self._plan
        changed: dict[str, Any] = {"position": _places(draws)}
        if len(self._plan.seen_ids):
            changed |= _seen(draws)
        if len(self._plan.mask):
            changed |= _masks(draws, self._vocab_size)
        self._plan = replace(self._plan, **changed)
        return self._plan


@dataclass(frozen=True, slots=True)
class _Shape:
    """The arrays of a batch that say only how long its runs are and which of them sample."""

    run_offsets: I32
    output_rows: I32
    output_kinds: npt.NDArray[np.uint8]


def _draws(runs: Ordered[Run], drawers: Ordered[Ordered[Sequence]]) -> list[Draw]:
    draws: list[Draw] = []
    for run, draw in zip(runs, drawers, strict=True):
        draws += [(sequence, ()) for sequence in draw]
        draws += [(run.sequence, run.draft[: index + 1]) for index in range(len(run.draft))]
    return draws


def _places(draws: Ordered[Draw]) -> I32:
    """Return the index of each drawn token in its completion."""
    return np.array([sequence.generated + len(guesses) for sequence, guesses in draws], np.int32)


def _shape(lengths: Ordered[int], rows: Ordered[int], kinds: Ordered[int] | None = None) -> _Shape:
    every_one = np.full(len(rows), OutputKind.SAMPLE, np.uint8)
    return _Shape(
        run_offsets=np.cumsum([0, *lengths], dtype=np.int32),
        output_rows=np.array(rows, np.int32),
        output_kinds=every_one if kinds is None else np.array(kinds, np.uint8),
    )


def _shape_of(runs: Ordered[Run], drawers: Ordered[Ordered[Sequence]]) -> _Shape:
    rows: list[int] = []
    kinds: list[int] = []
    end = 0
    for run, draw in zip(runs, drawers, strict=True):
        start, end = end, end + run.length + len(run.draft)
        if run.sequence.rows is not None:
            offset = start - run.sequence.computed
            rows += [position + offset for position in run.read_rows]
            kinds += [run.sequence.rows.readout.kind] * len(run.read_rows)
        known = end - len(run.draft)
        rows += [known - 1] * len(draw)
        rows += range(known, end)
        kinds += [OutputKind.SAMPLE] * (len(draw) + len(run.draft))
    return _shape([run.length + len(run.draft) for run in runs], rows, kinds)


def _scores(reading: Ordered[tuple[Rows | None, range]]) -> dict[str, I32]:
    """Return the fields of a batch that say what its SCORE rows score."""
    targets: list[int] = []
    top_n: list[int] = []
    for rows, positions in reading:
        if rows is not None and rows.readout.kind == OutputKind.SCORE:
            first = positions.start - rows.readout.start
            targets += rows.readout.targets[first : first + len(positions)]
            top_n += [rows.readout.top_n] * len(positions)
    return {
        "score_targets": np.array(targets, np.int32),
        "score_top_n": np.array(top_n, np.int32),
    }


def build_plan(draws: Ordered[Draw], vocab_size: int) -> SamplePlan:
    """Return how to draw each of these tokens."""
    sequences = [sequence for sequence, _ in draws]
    requests = [sequence.request for sequence in sequences]
    bias = [request.logit_bias for request in requests]
    return SamplePlan(
        temperature=np.array([each.temperature for each in requests], np.float32),
        top_k=np.array([each.top_k for each in requests], np.int32),
        top_p=np.array([each.top_p for each in requests], np.float32),
        min_p=np.array([each.min_p for each in requests], np.float32),
        typical_p=np.array([each.typical_p for each in requests], np.float32),
        seed=np.array([each.seed for each in requests], np.uint64),
        choice=np.array([sequence.choice for sequence in sequences], np.int32),
        position=_places(draws),
        top_logprobs=np.array([each.top_logprobs for each in requests], np.int32),
        repetition_penalty=np.array([each.repetition_penalty for each in requests], np.float32),
        frequency_penalty=np.array([each.frequency_penalty for each in requests], np.float32),
        presence_penalty=np.array([each.presence_penalty for each in requests], np.float32),
        bias_offsets=_offsets([len(each) for each in bias]),
        bias_ids=np.array([token for each in bias for token in each], np.int32),
        bias_values=np.array([value for each in bias for value in each.values()], np.float32),
        **_seen(draws),
        **_masks(draws, vocab_size),
    )


def _adapter_slots(runs: Ordered[Run]) -> I32:
    adapters = [run.sequence.request.adapter for run in runs]
    return np.array([-1 if each is None else each.slot for each in adapters], np.int32)


def _block_tables(runs: Ordered[Run]) -> I32:
    used = [run.sequence.blocks_for(run.end) for run in runs]
    if len(runs) == 1:
        return runs[0].sequence.block_table(used[0])[np.newaxis]
    tables = np.full((len(runs), max(used)), -1, np.int32)
    for table, run, count in zip(tables, runs, used, strict=True):
        table[:count] = run.sequence.block_table(count)
    return tables


def _seen(draws: Ordered[Draw]) -> dict[str, npt.NDArray[Any]]:
    """Return the fields of a plan that say what penalties look at."""
    seen = [
        sequence.seen.after(guesses) if guesses and sequence.seen is not None else sequence.seen
        for sequence, guesses in draws
    ]
    return {
        "seen_offsets": _offsets([0 if each is None else len(each) for each in seen]),
        "seen_ids": np.concatenate([_NO_IDS, *(each.ids for each in seen if each is not None)]),
        "seen_counts": np.concatenate(
            [_NO_IDS, *(each.counts for each in seen if each is not None)]
        ),
    }


def _offsets(lengths: Ordered[int]) -> I32:
    """Return where each of so many lists begins in one array of all, int32 [n + 1]."""
    return np.array([0, *itertools.accumulate(lengths)], np.int32)


def _masks(draws: Ordered[Draw], vocab_size: int) -> dict[str, npt.NDArray[Any]]:
    """Return the fields of a plan with a mask row for each draw that may not give all ids.

    These are sequences of a grammar, and such that may not end yet: one that has no row now will
    need none later.
    """
    rows = np.full(len(draws), -1, np.int32)
    masks: list[npt.NDArray[np.uint32]] = []
    for index, (sequence, guesses) in enumerate(draws):
        request, form = sequence.request, sequence.form
        early = sequence.generated + len(guesses) < request.min_tokens
        if form is not None:
            mask = form.mask.copy()
        elif early and request.banned_ids:
            mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        else:
            continue
        for token in request.banned_ids if early else ():
            mask[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
        for token in request.stop_ids if form is not None and form.may_end and not early else ():
            mask[token // 32] |= np.uint32(1 << (token % 32))
        rows[index] = len(masks)
        masks.append(mask)
    words = -(-vocab_size // 32)
    return {"mask": np.array(masks, np.uint32).reshape(len(masks), words), "mask_rows": rows}
