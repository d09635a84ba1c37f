"""Warnings about weights that can be read, but not as they were meant.

I2_S has three orders of codes and no mark of which one a file has. A wrong one mixes up the columns
of a matrix, which nothing within that matrix shows. But neurons of a feed-forward block differ in
how many weights they use, in their row of `up` as in their column of `down`: in the right order the
two go together, in a wrong one they do not.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import ModelSpec
from bitllm.errors import FormatError
from bitllm.formats.gguf.names import stored_name
from bitllm.formats.gguf.shards import GgufModel
from bitllm.formats.gguf.ternary_blocks import I2S_LAYOUTS, I2sLayout, i2s_codes
from bitllm.ternary import unpack

__all__ = ["layout_scores", "warn_of_layout", "warn_of_scales"]

_NEURONS = 1024
_COLUMNS = 4096
_CONVINCING = 8.0  # standard deviations of the correlation of unrelated numbers
_BITNET_RELU2 = ("bitnet-b1.58", "bitnet-25")


def warn_of_layout(model: GgufModel, spec: ModelSpec) -> None:
    """Warn if the I2_S tensors of the first layer look right in another order than the usual one.

    About a megabyte of the file is read for it.
    """
    scores = layout_scores(model, spec)
    usual = scores.get(I2S_LAYOUTS[0], 0.0)
    best = max(scores, key=lambda layout: scores[layout], default=I2S_LAYOUTS[0])
    if scores and scores[best] - usual > _CONVINCING:
        warnings.warn(
            f"{model.path}: its I2_S tensors look as if they were written in the layout {best!r}, "
            f"but are read as {I2S_LAYOUTS[0]!r}; if the text is nonsense, set "
            f"BITLLM_I2S_LAYOUT={best}",
            stacklevel=3,
        )


def layout_scores(model: GgufModel, spec: ModelSpec) -> dict[I2sLayout, float]:
    """Return how well each layout fits the first layer, in standard deviations of chance.

    Empty if `up` and `down` are no I2_S tensors of suitable shape.
    """
    names = [stored_name(f"layers.0.{part}") for part in ("up", "down")]
    if any(model.tensors[name].type.name != "I2_S" for name in names):
        return {}
    ffn, hidden = model.tensors[names[0]].shape
    neurons = min(_NEURONS, ffn // 128 * 128)
    outputs = min(_COLUMNS, hidden // 4 * 4)
    if neurons == 0 or hidden % 128 or ffn % 128 or spec.hidden_size != hidden:
        return {}
    up, down = (model.bytes(name) for name in names)
    # Rows of whole blocks can be cut off a matrix, and columns of whole blocks too; `row4` holds
    # four rows together, so its pieces are four times as wide.
    first_rows = up[: neurons * hidden // 4]
    scores: dict[I2sLayout, float] = {}
    for layout in I2S_LAYOUTS:
        try:
            rows = _used(i2s_codes(first_rows, (neurons, hidden), layout), hidden).mean(axis=1)
            columns = _used(_first_columns(down, (outputs, ffn), neurons, layout), neurons)
        except FormatError:
            continue
        scores[layout] = _agreement(rows, columns.mean(axis=0))
    return scores


def _first_columns(
    data: npt.NDArray[np.uint8], shape: tuple[int, int], columns: int, layout: I2sLayout
) -> npt.NDArray[np.uint8]:
    out, width = shape
    row_bytes, wanted = (width, columns) if layout == "row4" else (width // 4, columns // 4)
    lines = data[: out * width // 4].reshape(-1, row_bytes)[:, :wanted]
    return i2s_codes(np.ascontiguousarray(lines).reshape(-1), (out, columns), layout)


def _used(packed: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.bool_]:
    used: npt.NDArray[np.bool_] = unpack(packed, width) != 0
    return used


def _agreement(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return the correlation of two rows of numbers over its standard deviation by chance."""
    a, b = first - first.mean(), second - second.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size * len(a) ** 0.5 if size else 0.0


def warn_of_scales(model: GgufModel, spec: ModelSpec) -> None:
    """Warn if the weight scales look inverted, as a known converter has written them.

    The published models of these architectures have scales of 1 to 2; a converter divided by them.
    """
    if spec.architecture not in _BITNET_RELU2 or spec.hidden_size < 2_048:
        return
    scales = []
    for index in range(len(spec.layers)):
        tensor = model.tensors[stored_name(f"layers.{index}.q")]
        if tensor.type.name == "I2_S":
            count = tensor.shape[0] * tensor.shape[1] // 4
            scales.append(float(model.bytes(tensor.name)[count : count + 4].view("<f4")[0]))
    if scales and 0.25 < float(np.median(scales)) < 0.95:
        warnings.warn(
            f"{model.path}: the weight scales are about {np.median(scales):.2g}, where models of "
            "this kind have 1 to 2: a converter is known to write their inverse. If the text is "
            "nonsense, fetch another conversion",
            stacklevel=3,
        )
