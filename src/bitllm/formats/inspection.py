"""Looking at a checkpoint without loading it: the tensors in its files, and what is unusual there.

What a reader finds unusual itself, such as metadata that it had to repair, it warns of.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import Checkpoint, LayerSpec, ModelSpec, StridedMatrix, TernaryMatrix
from bitllm.errors import CheckpointError, QuantizationError
from bitllm.formats.gguf import GgufModel, find_gguf
from bitllm.formats.safetensors import SafetensorsFile

__all__ = ["StoredTensor", "oddities", "stored_tensors"]

SAMPLED_ROWS = 8
"""Rows of a mapped matrix that are looked at if not all are."""

LARGEST_GROWTH = 100.0
"""Times that a ternary layer may make its normalised input larger before its scale looks wrong.

Trained models keep this near 1. A scale that should divide but multiplies is wrong by its square,
for the usual scales of 0.01 to 0.05 by a factor of 400 to 10000.
"""

_NONZERO = 2 / 3
_ZEROS = 0b01010101
_INPUT_NORM = {
    "q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "o": "attn_sub_norm",
    "gate": "ffn_norm", "up": "ffn_norm", "down": "ffn_sub_norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file has it: its name and dtype there, its shape, its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a model's files, as they are stored.

    Args:
        path: the model's directory, or its GGUF file.

    Raises:
        CheckpointError: a file is broken.
    """
    gguf = find_gguf(path)
    if gguf is not None:
        for tensor in GgufModel(gguf).tensors.values():
            size = tensor.stop - tensor.start
            yield StoredTensor(tensor.name, tensor.type.name, tuple(tensor.shape), size)
        return
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in SafetensorsFile(file).entries.items():
            yield StoredTensor(name, entry.dtype, entry.shape, entry.stop - entry.start)


def oddities(checkpoint: Checkpoint, *, thorough: bool = False) -> list[str]:
    """Return what is unusual about the weights of a model, a sentence each.

    Args:
        checkpoint: an opened model.
        thorough: read every ternary matrix. Otherwise a few rows of those that are mapped as they
            are, and of the others those of the first and the last layer.
    """
    found: list[str] = []
    scales: dict[str, float] = {}
    of_scales: list[str] = []  # what the reader says of scales, where we have nothing to say
    last = len(checkpoint.spec.layers) - 1
    for name, _ in checkpoint.spec.linear_names():
        layer = int(name.split(".")[1])
        own: list[str] = []
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                matrix = None if thorough else checkpoint.strided(name)
                if matrix is not None:
                    own += _sampled(name, matrix)
                    scales[name] = float(matrix.scales)
                elif thorough or layer in (0, last):
                    whole = checkpoint.ternary(name)
                    own += _whole(name, whole)
                    scales[name] = float(np.median(whole.scales))
            except (CheckpointError, QuantizationError) as error:
                own.append(error.message)
        texts = [str(warning.message) for warning in told]
        of_scales += [text for text in texts if "looks inverted" in text]
        # What a reader warns of is told once: in its words or in ours.
        found += own or [text for text in texts if "looks inverted" not in text]
    found += [*_scale_oddities(checkpoint, scales)] or of_scales
    return _shortened(found)


def _sampled(name: str, matrix: StridedMatrix) -> Iterator[str]:
    """Look at some rows of bytes; at all of them if those hold nothing but zero weights."""
    stored = matrix.stored
    # Behind the last row of the matrix a byte may hold anything.
    rows = stored.shape[0] - (4 * stored.shape[0] - matrix.out_features > 0)
    if rows <= 0:
        return
    sample = stored[:rows][_spread(rows)]
    if _holds_code_three(sample):
        yield f"{name}: holds the code 3, which is no ternary weight"
    elif (sample == _ZEROS).all() and (stored[:rows] == _ZEROS).all():
        yield f"{name}: every weight is zero"


def _spread(rows: int) -> npt.NDArray[np.int64]:
    return np.unique(np.linspace(0, rows - 1, SAMPLED_ROWS).astype(np.int64))


def _holds_code_three(packed: npt.NDArray[np.uint8]) -> bool:
    return bool((packed & (packed >> np.uint8(1)) & np.uint8(_ZEROS)).any())


def _whole(name: str, matrix: TernaryMatrix) -> Iterator[str]:
    if _holds_code_three(matrix.packed):
        yield f"{name}: holds the code 3, which is no ternary weight"
    elif (matrix.packed == _ZEROS).all():
        yield f"{name}: every weight is zero"


def _scale_oddities(checkpoint: Checkpoint, scales: dict[str, float]) -> Iterator[str]:
    growth = {name: _growth(checkpoint, name, scale) for name, scale in scales.items()}
    large = {name: value for name, value in growth.items() if value > LARGEST_GROWTH}
    if large:
        name = max(large, key=lambda key: large[key])
        yield (
            f"{len(large)} of {len(scales)} weight scales look inverted: {name} would make its "
            f"input {large[name]:.3g} times as large (scale {scales[name]:.3g}); the file may "
            "mean them to divide where its configuration says multiply, or the other way round"
        )
    median = float(np.median([*scales.values()])) if scales else 0.0
    if _is_2b(checkpoint.spec) and 0.3 < median < 1:
        yield (
            f"weight scales look inverted: their median is {median:.3g}, the published 2B model "
            "has 1 to 2; a converter that divides by them writes such files"
        )


def _growth(checkpoint: Checkpoint, name: str, scale: float) -> float:
    """Return about how much larger than 1 the outputs are for an input of mean square 1.

    scale * sqrt(sum over k of (nonzero_k * gain_k^2)), with the gain of the norm before the layer;
    0 where there is no such norm.
    """
    _, index, linear = name.split(".")
    norm = _norm_before(checkpoint.spec.layers[int(index)], linear)
    if norm is None:
        return 0.0
    gain = checkpoint.dense(f"layers.{index}.{norm}").to_float32().astype(np.float64)
    return scale * math.sqrt(_NONZERO * float(np.sum(gain * gain)))


def _norm_before(layer: LayerSpec, linear: str) -> str | None:
    if layer.linear(linear).norm_eps is not None:
        return f"{linear}.norm"
    norm = _INPUT_NORM[linear]
    return norm if getattr(layer, norm) else None


def _is_2b(spec: ModelSpec) -> bool:
    """Whether this is the architecture of microsoft/bitnet-b1.58-2B-4T."""
    if (spec.hidden_size, len(spec.layers)) != (2560, 30):
        return False
    layer = spec.layers[0]
    return layer.up.out_features == 6912 and layer.activation == "relu2" and layer.attn_sub_norm


def _shortened(found: list[str]) -> list[str]:
    """Tell the same fault of many tensors once, with their number."""
    faults = Counter(text.partition(": ")[2] or text for text in found)
    told: list[str] = []
    for fault, count in faults.items():
        first = next(text for text in found if (text.partition(": ")[2] or text) == fault)
        told.append(first if count == 1 else f"{first} (and {count - 1} more)")
    return told
