"""Rounding weights and activations in PyTorch, as `bitllm.ternary` does it in NumPy.

A weight is approximated by level * scale, with one scale for the whole matrix:

    1 bit      sign(w), +1 for 0; scale = mean |w| (Wang et al., BitNet, 2023, without centring)
    1.58 bits  -1, 0, +1; scale = mean |w| (Ma et al., 2024)
    2 bits     -1.5, -0.5, +0.5, +1.5; scale = the step that is best for normally distributed
               weights (Max, Quantizing for minimum distortion, 1960). Whole levels symmetric about
               0, as for 4 and 8 bits, would be three: ternary weights with a worse scale
    n bits     -m .. m, m = 2^(n - 1) - 1; scale = max |w| / m
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitllm.errors import ConfigError
from bitllm.ternary import BASELINES, Baseline

__all__ = [
    "check_variant",
    "quantize_activations",
    "quantize_weights",
    "round_weights",
    "stored_scale",
    "weight_scale",
]

_SMALLEST_SCALE = 1e-5
_FOUR_LEVEL_STEP = 0.9957 / 0.797885  # Max's step over the mean size of a standard normal value


def check_variant(weight_bits: Baseline, activation_bits: int | None) -> None:
    """Refuse a quantisation that is not offered.

    Raises:
        ConfigError: names the argument and the value.
    """
    if weight_bits not in BASELINES:
        raise ConfigError(
            f"weight_bits must be one of {', '.join(map(repr, BASELINES))}, got {weight_bits!r:.40}"
        )
    if activation_bits is not None and activation_bits != 8:
        raise ConfigError(f"activation_bits must be 8 or None, got {activation_bits!r:.40}")


def quantize_weights(weight: Tensor, bits: Baseline = "1.58") -> tuple[Tensor, Tensor]:
    """Round master weights to levels with one scale for the whole matrix.

    Ternary levels are the codes of `bitllm.ternary.quantize_weights`; those of 1, 4 and 8 bits the
    levels of `bitllm.ternary.round_to_baseline`. The scale is rounded to bfloat16, as a published
    checkpoint stores it, so that what is trained is what is deployed.

    Args:
        weight: floating point [out, in].
        bits: which levels.

    Returns:
        levels float32 [out, in], and the scale float32 [] that multiplies them.
    """
    scale = weight_scale(weight, bits)
    return round_weights(weight, scale, bits), stored_scale(scale)


def stored_scale(scale: Tensor) -> Tensor:
    """Return a scale as a checkpoint holds it: rounded to bfloat16, as float32 again."""
    return scale.bfloat16().float()


def weight_scale(weight: Tensor, bits: Baseline) -> Tensor:
    """Return the scale float32 [] by which weights [out, in] are rounded."""
    values = weight.float()
    if bits in ("4", "8"):
        most = (1 << (int(bits) - 1)) - 1
        scale = values.abs().amax() / most
    else:
        # In float64 the mean does not depend on the order of summation.
        scale = (values.abs().sum(dtype=torch.float64) / values.numel()).float()
    if bits == "2":
        scale = scale * _FOUR_LEVEL_STEP
    return scale.clamp(min=_SMALLEST_SCALE)


def round_weights(weight: Tensor, scale: Tensor, bits: Baseline) -> Tensor:
    """Return the level nearest to each weight, float32 [out, in], by a scale of `weight_scale`."""
    values = weight.float()
    if bits == "1":
        return torch.where(values < 0, -1.0, 1.0)
    if bits == "1.58":
        return (values * (1.0 / scale)).round_().clamp_(-1, 1)
    if bits == "2":
        return (values / scale).floor_().clamp_(-2, 1).add_(0.5)
    most = (1 << (int(bits) - 1)) - 1
    return (values / scale).round_().clamp_(-most, most)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8 values by the largest size in each token.

    Args:
        x: floating point [..., features].

    Returns:
        q float32 [..., features], whole numbers in -128 .. 127, and a float32 [..., 1]; q / a
        approximates x. Equal to `bitllm.ternary.quantize_activations`.
    """
    values = x.float()
    largest = values.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST_SCALE)
    # A tensor, since torch computes number / tensor as number * (1 / tensor): two roundings.
    a = torch.full_like(largest, 127.0) / largest
    # Nothing to clamp: |values * a| is at most 127 but for its rounding.
    return (values * a).round_(), a
