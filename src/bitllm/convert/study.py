"""The study behind `bitllm quantize`: what rounding a dense checkpoint to a few bits does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from bitllm.checkpoint import DenseTensor
from bitllm.errors import FormatError, QuantizationError, UnsupportedModelError
from bitllm.formats import find_gguf, resolve_model
from bitllm.formats.ternary_values import read_ternary_values
from bitllm.formats.weight_files import FLOATS, WeightFile, open_weight_files
from bitllm.ternary import (
    Baseline,
    Distortion,
    Granularity,
    reconstruct,
    round_to_baseline,
)

__all__ = ["VERDICT", "MatrixReport", "StudyResult", "study_checkpoint"]

VERDICT = (
    "Rounding a dense model to ternary weights without training does not give a usable model: the "
    "noise of every matrix is near the size of its weights. Ternary models are trained as such."
)
"""What the study says whatever its figures are."""

_BAND = 1 << 20
_NOT_PROJECTIONS = ("embed", "lm_head", "wte", "wpe", "norm")


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One matrix, rounded in one way.

    Attributes:
        name: of the tensor.
        shape: (out, in).
        bits: of a weight.
        mse: mean squared error.
        sqnr_db: signal to quantisation noise in dB.
        cosine: of the angle between weights and rounded weights.
        zero_fraction: part of the weights rounded to 0.
        scale: mean of the scales.
    """

    name: str
    shape: tuple[int, int]
    bits: Baseline
    mse: float
    sqnr_db: float
    cosine: float
    zero_fraction: float
    scale: float


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The reports matrix by matrix, in the order of layers, and those of all matrices together."""

    model: str
    granularity: Granularity
    group_size: int | None
    matrices: tuple[MatrixReport, ...]
    whole: tuple[MatrixReport, ...]
    verdict: str = VERDICT


def study_checkpoint(
    ref: str | PathLike[str],
    bits: Sequence[Baseline],
    *,
    granularity: Granularity = "tensor",
    group_size: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> StudyResult:
    """Round every projection of a dense checkpoint and measure the difference.

    Args:
        ref: a directory with safetensors files or pytorch_model.bin, or a model of the Hub.
        bits: the baselines.
        granularity: what shares one scale.
        group_size: weights along a row that share a scale, for "group" only.
        advance: told of the matrices done and the matrices there are.

    Raises:
        CheckpointError: one of its kinds: no such files, or none of a dense model.
        QuantizationError: NaN or infinity among the weights, or a contradictory granularity.
    """
    files = resolve_model(ref)
    tensors = _projections(files.path)
    whole = {baseline: Distortion() for baseline in bits}
    scales: dict[Baseline, list[float]] = {baseline: [] for baseline in bits}
    reports = []
    for done, (name, file) in enumerate(tensors.items()):
        weights = _read(file, name)
        for baseline in bits:
            report = _round(name, weights, baseline, granularity, group_size, whole[baseline])
            scales[baseline].append(report.scale)
            reports.append(report)
        file.release(name)
        if advance is not None:
            advance(done + 1, len(tensors))
    shape = (len(tensors), 0)
    together = tuple(
        _report("all", shape, baseline, total, float(np.mean(scales[baseline])))
        for baseline, total in whole.items()
    )
    return StudyResult(files.name, granularity, group_size, tuple(reports), together)


def _projections(directory: Path) -> dict[str, WeightFile]:
    """Return the dense matrices of a model but for embeddings and head, in the order of layers."""
    if find_gguf(directory) is not None:
        raise UnsupportedModelError(
            f"{directory}: a GGUF file, and those are not studied",
            hint="the study needs the safetensors files that it was made from",
        )
    files = open_weight_files(directory)
    found = {
        name: file
        for name, file in sorted(files.items(), key=lambda item: _by_layer(item[0]))
        if name.endswith(".weight")
        and len(file.entry(name).shape) == 2
        and not any(part in name for part in _NOT_PROJECTIONS)
    }
    dense = {name: file for name, file in found.items() if file.entry(name).dtype in FLOATS}
    if len(dense) < len(found) or not found:
        raise UnsupportedModelError(
            f"{directory}: the matrices of this model are not dense: they are quantised already, "
            "or under names that are not known",
            hint="the study needs floating-point weights called `*.weight`",
        )
    first = next(iter(dense))
    if _is_ternary(dense[first].dense(first)):
        raise UnsupportedModelError(
            f"{directory}: {first!r} is ternary already",
            hint="`bitllm run` runs such a model, `bitllm convert` writes it in other formats",
        )
    return dense


def _is_ternary(weights: DenseTensor) -> bool:
    try:
        return read_ternary_values(weights) is not None
    except QuantizationError:  # NaN: told with its tensor when it is rounded
        return False


def _by_layer(name: str) -> list[tuple[bool, int, str]]:
    """Sort numbers in a name as numbers."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in name.split(".")
    ]


def _read(file: WeightFile, name: str) -> DenseTensor:
    tensor = file.dense(name)
    if not tensor.data.size:
        raise FormatError(f"{file.path}: {name!r} holds no weights")
    return tensor


def _round(
    name: str,
    weights: DenseTensor,
    bits: Baseline,
    granularity: Granularity,
    group_size: int | None,
    whole: Distortion,
) -> MatrixReport:
    values = weights.to_float32()
    try:
        levels, scales = round_to_baseline(
            values, bits, granularity=granularity, group_size=group_size
        )
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error.message}", hint=error.hint) from error
    here = Distortion()
    for rows in _bands(*levels.shape):
        rounded = reconstruct(levels, scales, rows, group_size)
        here.add(values[rows], rounded)
        whole.add(values[rows], rounded)
    return _report(name, (len(levels), levels.shape[1]), bits, here, float(scales.mean()))


def _bands(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BAND // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _report(
    name: str, shape: tuple[int, int], bits: Baseline, sums: Distortion, scale: float
) -> MatrixReport:
    return MatrixReport(
        name, shape, bits, sums.mse, sums.sqnr_db, sums.cosine, sums.zero_fraction, scale
    )


def by_bits(reports: Sequence[MatrixReport]) -> Mapping[Baseline, list[MatrixReport]]:
    """Return the reports of each baseline."""
    groups: dict[Baseline, list[MatrixReport]] = {}
    for report in reports:
        groups.setdefault(report.bits, []).append(report)
    return groups
