"""How the weights of a model are stored, as its config.json and the names of its tensors say it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bitllm.checkpoint import ScaleConvention
from bitllm.errors import NotTernaryError, UnsupportedModelError
from bitllm.formats.config_fields import ConfigFields
from bitllm.formats.mlx import AffineLayout, read_affine_layout

__all__ = ["Quantization", "dense_model", "read_quantization"]

_EXAMPLE = "for example microsoft/bitnet-b1.58-2B-4T"
_MOST_SHARDS = 1024
_LINEAR_NORM = re.compile(r"(?:self_attn|mlp)\.\w+_proj\.norm\.weight$")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of the projections are stored.

    Attributes:
        convention: a stored weight scale multiplies or divides the product.
        weights: what a floating-point weight without a scale is. "masters" are quantised when
            they are read; "values" have to be ternary already, whatever their scale. Weights that
            are packed, or in MLX's arrays, show it by the dtype of their tensor.
        activation_bits: 8, or None for models whose activations are not quantised.
        norm_eps: epsilon of an RMSNorm of each projection's own input, None = there is none.
        skipped: modules that transformers leaves as they are.
        shards: into how many parts, each with its own scale, training on several devices may have
            cut a matrix, along its rows or its columns.
        affine: how MLX stores what it quantised, None = it is no MLX directory.
        declared: config.json says that the model is ternary; otherwise its values have to show it.
        says_convention: config.json says whether stored scales multiply or divide.
    """

    convention: ScaleConvention = "multiply"
    weights: Literal["masters", "values"] = "values"
    activation_bits: Literal[8] | None = 8
    norm_eps: float | None = None
    skipped: tuple[str, ...] | None = None
    shards: int = 1
    affine: AffineLayout | None = None
    declared: bool = True
    says_convention: bool = False


def read_quantization(
    path: Path, fields: Mapping[str, Any], tensors: Collection[str] = ()
) -> Quantization:
    """Read how the weights are stored.

    Args:
        path: config.json, for messages.
        fields: its contents.
        tensors: names of the tensors in the model's files; some models say it by these alone.

    Raises:
        NotTernaryError: the weights are quantised in another way.
        UnsupportedModelError: a ternary variant that is not read.
        FormatError: a value of the wrong type.
    """
    config = ConfigFields(path, fields)
    affine = config.section("quantization")
    section = config.section("quantization_config")
    if affine is not None:
        return _affine(config, affine, section, _norm_eps(config, tensors))
    if section is None:
        return _without_section(config, tensors)
    method = section.text("quant_method", "").lower()
    if method != "bitnet":
        raise NotTernaryError(
            f"{path}: the weights are quantised with {method!r}, not ternary",
            hint="bitllm runs ternary models (quant_method 'bitnet'); repositories quantised with "
            "GPTQ, AWQ, bitsandbytes and their like were made from models that are not",
        )
    return _bitnet_section(section, _norm_eps(config, tensors))


def _affine(
    config: ConfigFields,
    affine: ConfigFields,
    section: ConfigFields | None,
    norm_eps: float | None,
) -> Quantization:
    """Read the section of MLX; one of transformers beside it tells of what MLX left as it was."""
    if section is not None and section.get("quant_method") == "bitnet":
        return replace(_bitnet_section(section, norm_eps), affine=read_affine_layout(affine))
    return Quantization(
        activation_bits=8 if _is_bitnet(config) else None,
        norm_eps=norm_eps,
        affine=read_affine_layout(affine),
    )


def _bitnet_section(section: ConfigFields, norm_eps: float | None) -> Quantization:
    """Read `quantization_config` of transformers; its defaults are those of BitNetQuantConfig."""
    linear_class = section.text("linear_class", "bitlinear")
    mode = section.text("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("online", "offline"):
        raise UnsupportedModelError(
            f"{section.path}: unknown linear_class {linear_class!r} or quantization_mode {mode!r}",
            hint="known are bitlinear and autobitlinear, online and offline",
        )
    skipped = section.get("modules_to_not_convert")
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)
    ):
        raise section.fail("modules_to_not_convert", "a list of strings")
    return Quantization(
        convention="multiply" if linear_class == "autobitlinear" else "divide",
        weights="masters" if mode == "online" else "values",
        norm_eps=norm_eps,
        skipped=None if skipped is None else tuple(skipped),
        says_convention=True,
    )


def _without_section(config: ConfigFields, tensors: Collection[str]) -> Quantization:
    bits = config.get("weight_bits"), config.get("input_bits")
    if bits == (1, 8):
        return Quantization(weights="masters")
    if bits[0] == 1:
        raise UnsupportedModelError(
            f"{config.path}: weights of 1 bit with activations of {bits[1]!r:.20} bits are not "
            "supported",
            hint=f"bitllm computes with activations of 8 bits, or with floats; {_EXAMPLE}",
        )
    if config.get("pretraining_model_parallel") is not None:
        shards = config.size("pretraining_model_parallel", most=_MOST_SHARDS)
        return Quantization(activation_bits=None, shards=shards)
    norm_eps = _norm_eps(config, tensors)
    if norm_eps is not None:
        return Quantization(weights="masters", norm_eps=norm_eps)
    return Quantization(activation_bits=8 if _is_bitnet(config) else None, declared=False)


def _norm_eps(config: ConfigFields, tensors: Collection[str]) -> float | None:
    """Epsilon of the projections' own norms, which embedding models show by their tensors alone."""
    section = config.section("quantization_config")
    if section is not None and section.switch("use_rms_norm"):
        return section.positive("rms_norm_eps", 1e-6)
    named = any(_LINEAR_NORM.search(name) for name in tensors)
    return config.positive("rms_norm_eps", 1e-6) if named else None


def _is_bitnet(config: ConfigFields) -> bool:
    """Whether config.json of a converted or dequantised model says that it is a BitNet: W1.58A8."""
    names = config.get("architectures")
    section = config.section("quantization_config")
    return (
        config.switch("is_bitnet_config")
        or config.text("model_type", "") == "bitnet"
        or (isinstance(names, list) and str(next(iter(names), "")).lower().startswith("bitnet"))
        or (section is not None and section.get("quant_method") == "bitnet")
        or (config.get("weight_bits"), config.get("input_bits")) == (1, 8)
    )


def dense_model(path: Path) -> NotTernaryError:
    """Return the error for weights that nothing says to be ternary, and that are not."""
    return NotTernaryError(
        f"{path}: this is not a ternary network: there is no quantization_config, and the weights "
        "have more than two sizes, as those of a dense model",
        hint=f"bitllm runs models that were trained to be ternary, {_EXAMPLE}; "
        "`bitllm quantize` rounds a dense one for study only, since it would not write sensible "
        "text without training. If these are master weights of a ternary model, set "
        '"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", '
        '"quantization_mode": "online"} in config.json',
    )
