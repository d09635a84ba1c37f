"""From scheduled runs to the flat arrays of a `Batch`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from operator import is_not

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import Batch, OutputKind, SamplePlan
from bitllm.engine.scheduler import Run
from bitllm.engine.sequence import Sequence

__all__ = ["BatchBuilder", "build_plan"]

I32 = npt.NDArray[np.int32]


class BatchBuilder:
    """Turns the scheduled runs of each step into a `Batch`.

    While the same requests decode, most arrays of one step are those of the step before: they are
    kept and given out again, so nobody may write into a batch.

    Args:
        vocab_size: width of the token masks.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._planned: list[Sequence] | None = None  # of a plan that can be used again
        self._plan = SamplePlan.greedy()
        self._of_one = _shape([], [])

    def build(self, runs: Ordered[Run]) -> Batch:
        """Return one step's batch, with one SAMPLE for each of the `drawers` of the runs, in order.

        Args:
            runs: at least one, with blocks for all of their tokens.
        """
        drawers = [run.drawers for run in runs]
        sampling = list(itertools.chain.from_iterable(drawers))
        if all(run.length == len(draw) == 1 for run, draw in zip(runs, drawers, strict=True)):
            shape = self._shape_of_one(len(runs))
            tokens = [run.sequence.token_ids[run.sequence.computed] for run in runs]
            positions = [run.sequence.computed for run in runs]
        else:
            shape = _shape_of(runs, drawers)
            tokens, positions = [], []
            for run in runs:
                start, end = run.sequence.computed, run.sequence.computed + run.length
                tokens += run.sequence.token_ids[start:end]
                positions += range(start, end)
        return Batch(
            token_ids=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            run_offsets=shape.run_offsets,
            block_tables=_block_tables(runs),
            adapter_slots=shape.adapter_slots,
            output_rows=shape.output_rows,
            output_kinds=shape.output_kinds,
            plan=self._plan_for(sampling),
        )

    def _shape_of_one(self, count: int) -> _Shape:
        if len(self._of_one.adapter_slots) != count:
            self._of_one = _shape([1] * count, range(count))
        return self._of_one

    def _plan_for(self, sequences: list[Sequence]) -> SamplePlan:
        kept = self._planned
        if kept is None or len(kept) != len(sequences) or any(map(is_not, kept, sequences)):
            self._plan = build_plan(sequences, self._vocab_size)
            self._planned = sequences if all(map(_lasts, sequences)) else None
            return self._plan
        positions = np.array([sequence.generated for sequence in sequences], np.int32)
        self._plan = replace(self._plan, position=positions)
        return self._plan


@dataclass(frozen=True, slots=True)
class _Shape:
    """The arrays of a batch that say only how long its runs are and which of them sample."""

    run_offsets: I32
    adapter_slots: I32
    output_rows: I32
    output_kinds: npt.NDArray[np.uint8]


def _lasts(sequence: Sequence) -> bool:
    """Whether the plan for this sequence says the same at each token to come, but for its place."""
    request = sequence.request
    may_end = not request.banned_ids or sequence.generated >= request.min_tokens
    return may_end and not request.penalised


def _shape(lengths: Ordered[int], rows: Ordered[int]) -> _Shape:
    return _Shape(
        run_offsets=np.cumsum([0, *lengths], dtype=np.int32),
        adapter_slots=np.full(len(lengths), -1, np.int32),
        output_rows=np.array(rows, np.int32),
        output_kinds=np.full(len(rows), OutputKind.SAMPLE, np.uint8),
    )


def _shape_of(runs: Ordered[Run], drawers: Ordered[Ordered[Sequence]]) -> _Shape:
    ends = itertools.accumulate(run.length for run in runs)
    rows = [end - 1 for end, draw in zip(ends, drawers, strict=True) for _ in draw]
    return _shape([run.length for run in runs], rows)


def build_plan(sequences: Ordered[Sequence], vocab_size: int) -> SamplePlan:
    """Return how to draw the next token of each of these sequences."""
    requests = [sequence.request for sequence in sequences]
    seen = [sequence.seen for sequence in sequences]
    bias = [request.logit_bias for request in requests]
    mask, mask_rows = _masks(sequences, vocab_size)
    seen_offsets, seen_ids = _ragged_ids(seen)
    bias_offsets, bias_ids = _ragged_ids(bias)
    return SamplePlan(
        temperature=np.array([each.temperature for each in requests], np.float32),
        top_k=np.array([each.top_k for each in requests], np.int32),
        top_p=np.array([each.top_p for each in requests], np.float32),
        min_p=np.array([each.min_p for each in requests], np.float32),
        seed=np.array([each.seed for each in requests], np.uint64),
        choice=np.array([sequence.choice for sequence in sequences], np.int32),
        position=np.array([sequence.generated for sequence in sequences], np.int32),
        top_logprobs=np.array([each.top_logprobs for each in requests], np.int32),
        repetition_penalty=np.array([each.repetition_penalty for each in requests], np.float32),
        frequency_penalty=np.array([each.frequency_penalty for each in requests], np.float32),
        presence_penalty=np.array([each.presence_penalty for each in requests], np.float32),
        seen_offsets=seen_offsets,
        seen_ids=seen_ids,
        seen_counts=np.array([count for ids in seen for count in ids.values()], np.int32),
        bias_offsets=bias_offsets,
        bias_ids=bias_ids,
        bias_values=np.array([value for ids in bias for value in ids.values()], np.float32),
        mask=mask,
        mask_rows=mask_rows,
    )


def _block_tables(runs: Ordered[Run]) -> I32:
    used = [run.sequence.blocks_for(run.sequence.computed + run.length) for run in runs]
    if len(runs) == 1:
        return runs[0].sequence.block_table(used[0])[np.newaxis]
    tables = np.full((len(runs), max(used)), -1, np.int32)
    for table, run, count in zip(tables, runs, used, strict=True):
        table[:count] = run.sequence.block_table(count)
    return tables


def _ragged_ids(rows: Ordered[Mapping[int, float]]) -> tuple[I32, I32]:
    """Return offsets int32 [n + 1] and the ids of all rows in one array."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    if any(rows):
        np.cumsum([len(row) for row in rows], out=offsets[1:])
    return offsets, np.array([token for row in rows for token in row], np.int32)


def _masks(sequences: Ordered[Sequence], vocab_size: int) -> tuple[npt.NDArray[np.uint32], I32]:
    """Return a mask row for each sequence that may not end yet: all ids but its stop ids."""
    rows = np.full(len(sequences), -1, np.int32)
    masks: list[npt.NDArray[np.uint32]] = []
    for index, sequence in enumerate(sequences):
        request = sequence.request
        if request.banned_ids and sequence.generated < request.min_tokens:
            rows[index] = len(masks)
            mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
            for token in request.banned_ids:
                mask[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
            masks.append(mask)
    return np.array(masks, np.uint32).reshape(len(masks), -(-vocab_size // 32)), rows
