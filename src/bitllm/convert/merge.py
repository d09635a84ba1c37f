"""Merging a low-rank adapter into ternary weights, which are rounded again; and what that loses.

W = scale * codes becomes W + U, U = B A * alpha / rank. Codes are rounded by the scale that the
matrix has, and the scale is then the one of least squared error, so that an adapter that adds
nothing changes nothing (a mean of sizes, as for master weights, would shrink the weights by the
part of them that is not zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix
from bitllm.errors import UnsupportedModelError
from bitllm.formats.writers.dense import round_to

__all__ = ["MergeLoss", "merge_adapter", "merge_losses"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MergeLoss:
    """What the rounding of one merged matrix loses; sizes are Frobenius norms.

    Attributes:
        update: size of the update, of that of the weights.
        missing: size of what is missing after rounding, of that of the update: 0 = nothing,
            1 = as much as if the adapter had been left out.
        changed: part of the codes that are others.
    """

    update: float
    missing: float
    changed: float


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return a model with the adapter in its weights, each matrix made when it is read.

    Raises:
        TensorShapeError: the adapter was made for another architecture.
        UnsupportedModelError: a matrix with scales for groups, or a projection with a norm of its
            own, whose update sees another input than its weights.
    """
    adapter.check(checkpoint.spec)
    for name in adapter.updates:
        _, layer, linear = name.split(".")
        if checkpoint.spec.layers[int(layer)].linear(linear).norm_eps is not None:
            raise UnsupportedModelError(
                f"{adapter.origin}: {name} has a norm of its own, behind which its weights are and "
                "before which the adapter is: they cannot be merged",
                hint="load the adapter beside the model instead",
            )
        if checkpoint.scales(name).group_size is not None:
            raise UnsupportedModelError(
                f"{checkpoint.origin}: {name} has scales for groups: no adapter is merged into it"
            )
    source = _MergedSource(checkpoint, adapter.updates)
    return replace(checkpoint, source=source, origin=f"{checkpoint.origin} + {adapter.origin}")


def merge_losses(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, MergeLoss]:
    """Return what a merge loses, by the name of the matrix; arguments as for `merge_adapter`."""
    losses = {}
    for name, update in adapter.updates.items():
        matrix = checkpoint.ternary(name)
        merged = _merged(matrix, update)
        before, added = _values(matrix), _product(update)
        missing = before + added - _values(merged)
        size = max(float(np.linalg.norm(added)), 1e-30)
        losses[name] = MergeLoss(
            update=size / max(float(np.linalg.norm(before)), 1e-30),
            missing=float(np.linalg.norm(missing)) / size if added.any() else 0.0,
            changed=float(np.mean(matrix.codes() != merged.codes())),
        )
        checkpoint.release()
    return losses


class _MergedSource:
    """The tensors of a checkpoint, those that an adapter changes merged with it."""

    def __init__(self, base: Checkpoint, updates: Mapping[str, LowRankUpdate]) -> None:
        self._base, self._updates = base, updates

    def dense(self, name: str) -> DenseTensor | None:
        """Return the dense tensor of the base."""
        return self._base.source.dense(name)

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Return the matrix of the base, merged where the adapter changes it."""
        matrix = self._base.source.ternary(name)
        if matrix is None or name not in self._updates:
            return matrix
        return _merged(matrix, self._updates[name])


def _merged(matrix: TernaryMatrix, update: LowRankUpdate) -> TernaryMatrix:
    values = _values(matrix) + _product(update)
    steps = np.maximum(_by_row(matrix.scales), np.float32(1e-30))
    codes = np.clip(np.rint(values / steps), -1, 1).astype(np.int8)
    scales = _best_scales(values, codes, matrix.scales)
    if (_in_bfloat16(matrix.scales) == matrix.scales).all():  # as the base stores them
        scales = _in_bfloat16(scales)
    return TernaryMatrix.from_codes(codes, scales)


def _best_scales(values: F32, codes: npt.NDArray[np.int8], before: F32) -> F32:
    """Return sum(w c) / sum(c c), of a row or of all; where no code is left, what there was."""
    products = (values.astype(np.float64) * codes).sum(axis=1)
    counts = np.count_nonzero(codes, axis=1).astype(np.float64)
    if before.ndim == 0:
        products, counts = products.sum(), counts.sum()
    best = np.where(counts > 0, products / np.maximum(counts, 1), before)
    return np.asarray(best, np.float32)


def _values(matrix: TernaryMatrix) -> F32:
    return np.asarray(matrix.codes() * _by_row(matrix.scales), np.float32)


def _by_row(scales: F32) -> F32:
    return scales if scales.ndim == 0 else scales[:, None]


def _product(update: LowRankUpdate) -> F32:
    product = update.b.to_float32() @ update.a.to_float32()
    return np.asarray(product * np.float32(update.scale), np.float32)


def _in_bfloat16(values: F32) -> F32:
    return round_to(values, "bf16").to_float32().reshape(values.shape)
