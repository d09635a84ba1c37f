"""Logits: hidden states in float32 times the head in the dtype it is stored in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitllm.backends.cuda.kernels import INTERPRETED

__all__ = ["logits_of"]


@triton.jit
def _logits(
    hidden,
    head,
    logits,
    tokens,
    vocab,
    columns,
    FLOAT32: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ids = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    k = tl.arange(0, COLUMNS)
    row_mask, id_mask = (rows < tokens)[:, None], (ids < vocab)[None, :]
    sums = tl.zeros((ROWS, IDS), tl.float32)
    for start in range(0, columns, COLUMNS):
        inside = start + k < columns
        x_where = rows[:, None] * columns + start + k[None, :]
        x = tl.load(hidden + x_where, mask=row_mask & inside[None, :], other=0.0)
        w_where = ids[None, :] * columns + start + k[:, None]
        w = tl.load(head + w_where, mask=id_mask & inside[:, None], other=0.0)
        if FLOAT32:
            sums = tl.dot(x, w.to(tl.float32), sums, input_precision="ieee")
        else:
            # Three numbers of the head's dtype add up to all 24 bits of a float32.
            for _ in tl.static_range(3):
                part = x.to(w.dtype)
                x = x - part.to(tl.float32)
                sums = tl.dot(part, w, sums)
    tl.store(logits + rows[:, None] * vocab + ids[None, :], sums, mask=row_mask & id_mask)


def _tile(tokens: int) -> tuple[dict[str, int], int]:
    """Return the sizes of a tile, and the warps that compute it."""
    if tokens <= 16:
        return {"ROWS": 16, "IDS": 64, "COLUMNS": 64}, 4
    return {"ROWS": 64, "IDS": 64, "COLUMNS": 64}, 8


def logits_of(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the logits of hidden states, float32 [tokens, vocab].

    Args:
        hidden: float32 [tokens, columns].
        head: bfloat16 or float32 [vocab, columns].
    """
    (tokens, columns), vocab = hidden.shape, len(head)
    logits = torch.empty((tokens, vocab), device=hidden.device)
    tile, warps = _tile(tokens)
    _logits[(triton.cdiv(vocab, tile["IDS"]), triton.cdiv(tokens, tile["ROWS"]))](
        hidden,
        head,
        logits,
        tokens,
        vocab,
        columns,
        FLOAT32=INTERPRETED or head.dtype != torch.bfloat16,
        **tile,
        num_warps=warps,
    )
    return logits
