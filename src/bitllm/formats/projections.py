"""Where and how the ternary matrices of a model directory are stored, by its files' headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitllm.checkpoint import LinearSpec
from bitllm.errors import UnsupportedModelError
from bitllm.formats.mlx import AffineTensors, find_affine
from bitllm.formats.quantization import Quantization
from bitllm.formats.weight_files import FLOATS, WeightFile, entry_of, wrong_tensor

__all__ = ["Projection", "ProjectionFinder", "check_all_converted"]

_MAX_REPETITIONS = 3  # in a regular expression of the configuration


@dataclass(frozen=True, slots=True)
class Projection:
    """Where a ternary matrix is stored.

    Attributes:
        module: prefix of its tensors' names.
        storage: "packed" = four codes in a byte; "masters" = floats to be rounded; "values" =
            floats that are ternary already; "affine" = the groups of MLX.
        has_scale: whether the file holds its weight scale as a tensor of its own.
        affine: its tensors, where the storage is "affine".
    """

    module: str
    storage: Literal["packed", "masters", "values", "affine"]
    has_scale: bool = False
    affine: AffineTensors | None = None


class ProjectionFinder:
    """Finds the matrices of one model directory, and checks shapes and dtypes of their tensors.

    Args:
        directory: named in errors.
        files: the file that holds each tensor.
        quantization: what config.json says of the weights.
    """

    def __init__(
        self, directory: Path, files: Mapping[str, WeightFile], quantization: Quantization
    ) -> None:
        self._directory = directory
        self._files = files
        self._quantization = quantization

    def find(self, module: str, linear: LinearSpec) -> Projection:
        """Return where the matrix of a module is stored.

        Raises:
            MissingTensorError: a tensor is not there.
            TensorShapeError: one has another shape or dtype than any storage allows.
            UnsupportedModelError: config.json does not say what its scale means.
        """
        stored = f"{module}.weight"
        out, width = linear.out_features, linear.in_features
        layout = self._quantization.affine
        if layout is not None and f"{module}.scales" in self._files:
            affine = find_affine(self._files, module, (out, width), layout.of(module))
            return Projection(module, "affine", affine=affine)
        entry = entry_of(self._files, stored)
        if entry.dtype == "U8" and entry.shape == (-(-out // 4), width):
            return self._packed(module)
        if entry.dtype not in FLOATS or entry.shape != (out, width):
            wanted = f"U8 {[-(-out // 4), width]} (packed) or floating point {[out, width]}"
            raise wrong_tensor(self._files, stored, wanted)
        if f"{module}.weight_scale" not in self._files:
            return Projection(module, self._quantization.weights)
        self._check_scale(f"{module}.weight_scale")
        return Projection(module, "values", has_scale=True)

    def _packed(self, module: str) -> Projection:
        if not self._quantization.says_convention:
            raise UnsupportedModelError(
                f"{self._directory}: '{module}.weight' is packed, but config.json has no "
                "quantization_config to say whether its scale multiplies or divides",
                hint="take config.json from the repository that the weights came from",
            )
        self._check_scale(f"{module}.weight_scale")
        return Projection(module, "packed", has_scale=True)

    def _check_scale(self, stored: str) -> None:
        entry = entry_of(self._files, stored)
        if math.prod(entry.shape) != 1 or entry.dtype not in FLOATS:
            raise wrong_tensor(self._files, stored, "one number in F32, BF16 or F16")


def check_all_converted(
    directory: Path, modules: Iterable[str], tied_head: bool, skipped: tuple[str, ...] | None
) -> None:
    """Refuse models with dense projections, or with a quantised head.

    Args:
        directory: named in errors.
        modules: prefixes of the tensors of all projections.
        tied_head: whether the head is the embedding.
        skipped: modules_to_not_convert of config.json; None = it is not said.

    Raises:
        UnsupportedModelError: a projection is left dense, the head is not, or a pattern could take
            exponential time to match.
    """
    if skipped is None:
        return
    for pattern in skipped:
        if _may_run_for_ever(pattern):
            raise UnsupportedModelError(
                f"{directory}: modules_to_not_convert holds the intricate pattern {pattern!r:.100}",
                hint="name the modules instead",
            )
    for module in modules:
        if _is_skipped(module, skipped):
            raise UnsupportedModelError(
                f"{directory}: modules_to_not_convert leaves {module!r} dense; "
                "models with dense projections are not supported"
            )
    if not tied_head and not _is_skipped("lm_head", skipped):
        raise UnsupportedModelError(
            f"{directory}: modules_to_not_convert does not name lm_head, so the head is "
            "quantised; that is not supported"
        )


def _may_run_for_ever(pattern: str) -> bool:
    """Whether matching could take exponential time: many repetitions, or repeated groups."""
    repetitions = re.findall(r"[*+?{]", pattern.replace("(?", "("))
    return len(repetitions) > _MAX_REPETITIONS or re.search(r"\)[*+?{]", pattern) is not None


def _is_skipped(module: str, skipped: tuple[str, ...]) -> bool:
    """Whether transformers leaves a module as it is: by its path, part of it, or its last parts."""
    for pattern in skipped:
        if module.endswith(pattern):
            return True
        try:
            if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
                return True
        except re.error:
            continue
    return False
