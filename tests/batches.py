"""Batches and sampling plans, written shortly: what the engine would send to a decoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, Decoder, OutputKind, SamplePlan
from synthetic import random_words


@dataclass(frozen=True)
class Run:
    """The next tokens of one sequence, which begins in the KV blocks given here."""

    ids: Sequence[int]
    start: int = 0
    blocks: Sequence[int] = range(8)
    adapter: int = -1


def make_batch(
    runs: Sequence[Run],
    kind: int = OutputKind.LOGITS,
    rows: Sequence[int] | None = None,
    **fields: Any,
) -> Batch:
    """One batch whose rows (default: all) each want an output of one kind."""
    lengths = [len(run.ids) for run in runs]
    width = max(len(run.blocks) for run in runs)
    tables = np.full((len(runs), width), -1, np.int32)
    for table, run in zip(tables, runs, strict=True):
        table[: len(run.blocks)] = run.blocks
    wanted = np.arange(sum(lengths)) if rows is None else np.array(rows)
    return Batch(
        token_ids=np.concatenate([np.array(run.ids, np.int32) for run in runs]),
        positions=np.concatenate(
            [np.arange(run.start, run.start + len(run.ids), dtype=np.int32) for run in runs]
        ),
        run_offsets=np.cumsum([0, *lengths], dtype=np.int32),
        block_tables=tables,
        adapter_slots=np.array([run.adapter for run in runs], np.int32),
        output_rows=wanted.astype(np.int32),
        output_kinds=np.full(len(wanted), kind, np.uint8),
        **fields,
    )


def prompt_ids(count: int, vocab: int, seed: int = 0) -> list[int]:
    """A prompt of random ids."""
    return [int(word % vocab) for word in random_words(seed, "prompt", count)]


def logits_of(
    decoder: Decoder, ids: Sequence[int], cuts: Sequence[int] = (), adapter: int = -1
) -> np.ndarray:
    """Logits of every token of a prompt, fed in one piece or cut before the given positions."""
    edges = [0, *cuts, len(ids)]
    blocks = range(-(-len(ids) // KV_BLOCK_SIZE))
    parts = [
        decoder.forward(make_batch([Run(ids[start:end], start, blocks, adapter)])).logits
        for start, end in itertools.pairwise(edges)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Draw:
    """One entry of a plan; the fields of `SamplePlan`, its lists as dictionaries."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    top_logprobs: int = -1
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seen: dict[int, int] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None


def make_plan(draws: Sequence[Draw], vocab: int) -> SamplePlan:
    """The plan of these entries; each entry with a mask has a row of its own."""
    blank = SamplePlan.greedy(len(draws))
    plain = {
        name: np.array([getattr(draw, name) for draw in draws], getattr(blank, name).dtype)
        for name in Draw.__dataclass_fields__
        if name not in ("seen", "bias", "allowed")
    }
    masks, mask_rows = [], []
    for draw in draws:
        mask_rows.append(-1 if draw.allowed is None else len(masks))
        if draw.allowed is not None:
            bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
            bits[sorted(draw.allowed)] = 1
            masks.append(np.packbits(bits, bitorder="little").view("<u4"))
    return replace(
        blank,
        **plain,
        seen_offsets=np.cumsum([0, *(len(draw.seen) for draw in draws)], dtype=np.int32),
        seen_ids=np.array([i for draw in draws for i in draw.seen], np.int32),
        seen_counts=np.array([n for draw in draws for n in draw.seen.values()], np.int32),
        bias_offsets=np.cumsum([0, *(len(draw.bias) for draw in draws)], dtype=np.int32),
        bias_ids=np.array([i for draw in draws for i in draw.bias], np.int32),
        bias_values=np.array([v for draw in draws for v in draw.bias.values()], np.float32),
        mask=np.array(masks, np.uint32).reshape(len(masks), -(-vocab // 32)),
        mask_rows=np.array(mask_rows, np.int32),
    )
