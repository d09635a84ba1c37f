"""Bits per byte of held-out text, by PyTorch or by any bitllm backend: the same sum, two computers.

Each document is cut into pieces that fit the context; every piece starts with the begin token, and
each further token of it costs -log2 of its probability. Their sum, divided by the UTF-8 bytes of
the text, is the figure. Tokens that mark turns and ends are predicted and counted too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, Decoder, OutputKind
from bitllm.train.data import TokenShards
from bitllm.train.model import UNTRAINED, TernaryDecoder

__all__ = ["decoder_bits", "held_out_pieces", "torch_bits"]

Ids = npt.NDArray[np.int64]
Counted = Sequence[npt.NDArray[np.bool_]]


def held_out_pieces(shards: TokenShards, context: int) -> list[Ids]:
    """Cut the documents into pieces of begin + at most `context` - 1 tokens, int64 [n] each."""
    return list(_pieces(shards, context))


def _pieces(shards: TokenShards, context: int) -> Iterator[Ids]:
    begin = np.array([shards.begin_id], np.int64)
    for document in shards.documents():
        for start in range(1, len(document), context - 1):
            yield np.concatenate((begin, document[start : start + context - 1]))


def torch_bits(
    model: TernaryDecoder, pieces: Sequence[Ids], counted: Counted | None = None
) -> float:
    """Return the bits that the model needs for all pieces together.

    Args:
        model: as it is.
        pieces: token ids.
        counted: which tokens of each piece count, bool [n]; None = all but the first.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats = 0.0
    with torch.no_grad():  # FSDP gathers weights in it that training uses again
        for piece, targets in zip(pieces, _targets(pieces, counted), strict=True):
            logits = model(torch.from_numpy(piece).to(device)[None, :-1])[0].float()
            wanted = torch.from_numpy(targets).to(device)
            loss = functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=UNTRAINED)
            nats += loss.item()
    model.train(training)
    return nats / math.log(2)


def _targets(pieces: Sequence[Ids], counted: Counted | None) -> Iterator[Ids]:
    for index, piece in enumerate(pieces):
        targets = piece[1:]
        yield targets if counted is None else np.where(counted[index][1:], targets, UNTRAINED)


def decoder_bits(decoder: Decoder, pieces: Sequence[Ids], counted: Counted | None = None) -> float:
    """Return the bits that a loaded decoder needs for all pieces together, by SCORE outputs.

    The decoder must take steps of as many rows, and hold as many positions, as the longest piece.
    Arguments as for `torch_bits`.
    """
    nats = 0.0
    for piece, targets in zip(pieces, _targets(pieces, counted), strict=True):
        output = decoder.forward(_score_batch(piece))
        nats -= float(output.logprobs.astype(np.float64)[targets != UNTRAINED].sum())
    return nats / math.log(2)


def _score_batch(piece: Ids) -> Batch:
    rows = len(piece) - 1
    blocks = -(-rows // KV_BLOCK_SIZE)
    positions = np.arange(rows, dtype=np.int32)
    return Batch(
        token_ids=piece[:-1].astype(np.int32),
        positions=positions,
        run_offsets=np.array([0, rows], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        adapter_slots=np.full(1, -1, np.int32),
        output_rows=positions,
        output_kinds=np.full(rows, OutputKind.SCORE, np.uint8),
        score_targets=piece[1:].astype(np.int32),
        score_top_n=np.zeros(rows, np.int32),
    )
