"""From scheduled runs to the flat arrays of a `Batch`."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import Batch, OutputKind, SamplePlan
from bitllm.engine.scheduler import Run
from bitllm.engine.sequence import Sequence

__all__ = ["build_batch", "build_plan"]

I32 = npt.NDArray[np.int32]


def build_batch(runs: Ordered[Run], vocab_size: int) -> Batch:
    """Return one step's batch; each run that `samples` asks for one SAMPLE, in order.

    Args:
        runs: at least one, with blocks for all of their tokens.
        vocab_size: width of the token masks.
    """
    tokens: list[int] = []
    offsets = [0]
    positions: list[range] = []
    rows: list[int] = []
    for run in runs:
        start = run.sequence.computed
        tokens += run.sequence.token_ids[start : start + run.length]
        positions.append(range(start, start + run.length))
        offsets.append(len(tokens))
        if run.samples:
            rows.append(len(tokens) - 1)
    return Batch(
        token_ids=np.array(tokens, np.int32),
        positions=np.fromiter((p for part in positions for p in part), np.int32, len(tokens)),
        run_offsets=np.array(offsets, np.int32),
        block_tables=_block_tables(runs),
        adapter_slots=np.full(len(runs), -1, np.int32),
        output_rows=np.array(rows, np.int32),
        output_kinds=np.full(len(rows), OutputKind.SAMPLE, np.uint8),
        plan=build_plan([run.sequence for run in runs if run.samples], vocab_size),
    )


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
        choice=np.zeros(len(requests), np.int32),
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
