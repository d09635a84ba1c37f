"""A written model, read back: every code, scale and dense value, and logits of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitllm.backends import get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, Batch, LoadOptions, OutputKind
from bitllm.checkpoint import Checkpoint, DenseTensor, TernaryMatrix
from bitllm.config import EngineOptions
from bitllm.engine.memory_plan import plan_memory
from bitllm.errors import (
    BackendUnavailableError,
    ConversionError,
    InsufficientMemoryError,
    UnsupportedModelError,
)
from bitllm.formats import open_checkpoint
from bitllm.formats.writers import WritePlan
from bitllm.formats.writers.dense import relative_error
from bitllm.formats.writers.differences import spec_differences

__all__ = ["Verification", "verify"]

F32 = npt.NDArray[np.float32]

_PROMPT_TOKENS = 8
_BAND = 1 << 20


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and how far apart it is where the format cannot hold the source.

    Attributes:
        matrices: ternary matrices, whose codes are all equal.
        dense: other tensors.
        scale_error: largest relative error of a scale or a bias; 0 where all are equal.
        logits_error: largest difference of a logit over the largest logit; 0 = all bits are equal;
            None = not computed, and `logits_skipped` says why.
        logits_skipped: why no logits were computed, or None.
    """

    matrices: int
    dense: int
    scale_error: float
    logits_error: float | None
    logits_skipped: str | None = None


def verify(
    source: Checkpoint,
    plan: WritePlan,
    written: Path,
    device: str | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare a written model with its source.

    Args:
        source: what was to be written.
        plan: how it was; only tensors in its `errors` may differ, and by no more than it says.
        written: the file or directory.
        device: what computes the logits, None = the default.
        advance: told of the tensors compared and the tensors there are.

    Raises:
        ConversionError: something differs that should not.
    """
    target = open_checkpoint(written)
    different = spec_differences(source.spec, target.spec)
    if different:
        raise _wrong(f"another architecture is read from it: {', '.join(different[:3])}")
    linears = [name for name, _ in source.spec.linear_names()]
    dense = list(source.spec.dense_shapes())
    errors = [0.0]
    for done, name in enumerate([*linears, *dense]):
        compare = _compare_matrix if done < len(linears) else _compare_dense
        errors.append(compare(name, source, target, plan.errors.get(name, 0.0)))
        if advance is not None:
            advance(done + 1, len(linears) + len(dense))
    skipped, logits_error = None, None
    try:
        logits_error = _compare_logits(source, target, device)
    except (BackendUnavailableError, InsufficientMemoryError, UnsupportedModelError) as error:
        skipped = error.message
    if logits_error and not plan.errors and not _regrouped(source, target, linears):
        raise _wrong("codes, scales and dense values are equal, but logits are not")
    return Verification(len(linears), len(dense), max(errors), logits_error, skipped)


def _regrouped(source: Checkpoint, target: Checkpoint, linears: list[str]) -> bool:
    """Whether scales are shared by other groups: the same weights, summed in another order."""
    pairs = ((source.scales(name), target.scales(name)) for name in linears)
    return any(one.scales.shape != other.scales.shape for one, other in pairs)


def _wrong(what: str) -> ConversionError:
    return ConversionError(
        f"what was written is not what was to be written: {what}",
        hint="nothing was left behind; try another disk, and report this if it stays",
    )


def _compare_matrix(name: str, source: Checkpoint, target: Checkpoint, allowed: float) -> float:
    one, other = source.ternary(name), target.ternary(name)
    if one.packed.shape != other.packed.shape or not (one.packed == other.packed).all():
        raise _wrong(f"codes of {name}")
    error = relative_error(*_scales_side_by_side(other, one))
    # A planned error is what rounding once gives; nothing may be off by more.
    if error > allowed * (1 + 1e-9):
        raise _wrong(f"scales of {name}, by {error:.2g}")
    source.release()
    target.release()
    return error


def _scales_side_by_side(one: TernaryMatrix, other: TernaryMatrix) -> tuple[F32, F32]:
    """Return the scales of two matrices for each group that both know, [out or 1, groups or 1]."""
    width = one.in_features
    group = math.gcd(one.group_size or width, other.group_size or width)
    expanded = [_expanded(matrix, group) for matrix in (one, other)]
    first, second = np.broadcast_arrays(*expanded)
    return first, second


def _expanded(matrix: TernaryMatrix, group: int) -> F32:
    if matrix.group_size is not None:
        columns = -(-matrix.in_features // group)
        return np.repeat(matrix.scales, matrix.group_size // group, axis=1)[:, :columns]
    return matrix.scales.reshape(-1, 1)


def _compare_dense(name: str, source: Checkpoint, target: Checkpoint, allowed: float) -> float:
    one, other = source.dense(name), target.dense(name)
    step = max(1, _BAND // math.prod(one.shape[1:]))
    error = 0.0
    for start in range(0, one.shape[0], step):
        values, others = (
            DenseTensor(tensor.data[start : start + step], tensor.dtype).to_float32()
            for tensor in (one, other)
        )
        if not np.array_equal(values.view(np.uint32), others.view(np.uint32)):
            error = max(error, relative_error(others, values))
            if not error <= allowed * (1 + 1e-9):
                raise _wrong(f"values of {name}")
        source.release()
        target.release()
    return error


def _compare_logits(source: Checkpoint, target: Checkpoint, device: str | None) -> float:
    """Return the largest difference over the largest logit; 0 only if all bits are equal."""
    wanted = _logits(source, device)
    found = _logits(target, device)
    if np.array_equal(wanted.view(np.uint32), found.view(np.uint32)):
        return 0.0
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _logits(checkpoint: Checkpoint, device: str | None) -> F32:
    """Compute logits of a short prompt, float32 [tokens, vocab].

    Raises:
        InsufficientMemoryError: the model does not fit.
        UnsupportedModelError: the device does not run it.
    """
    context = min(KV_BLOCK_SIZE, checkpoint.spec.max_context)
    plan_memory(checkpoint, EngineOptions(context=context)).check("the model")
    decoder = get_backend(device).load(
        checkpoint, LoadOptions(kv_tokens=KV_BLOCK_SIZE, kv_dtype="fp32", head="full")
    )
    count = min(_PROMPT_TOKENS, context)
    batch = Batch(
        token_ids=np.arange(count, dtype=np.int32) * 37 % checkpoint.spec.vocab_size,
        positions=np.arange(count, dtype=np.int32),
        run_offsets=np.array([0, count], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        adapter_slots=np.full(1, -1, np.int32),
        output_rows=np.arange(count, dtype=np.int32),
        output_kinds=np.full(count, OutputKind.LOGITS, np.uint8),
    )
    logits = decoder.forward(batch).logits
    return np.array(logits, np.float32)
