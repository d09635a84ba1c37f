"""The linear layer of few bits as it is trained: `BitLinear`, a drop-in `torch.nn.Linear`.

The forward pass is the deployed one; in float32 bit for bit: int8 activations times ternary codes,
summed exactly, divided by the activation scale and multiplied by the weight scale. The backward
pass takes both roundings for the identity (straight-through estimator, Bengio et al., 2013), so
that gradients reach the full-precision master weights.

What is kept for the backward pass is one byte an activation (its int8 code, instead of the
activation itself) and a scale a token; weights are rounded again from the masters.

With a strength s between 0 and 1 the layer is on its way from dense to quantised: weights and
activations are w + s (w' - w) and x + s (x' - x), where w' and x' are the rounded ones (Hugging
Face, Fine-tuning LLMs to 1.58 bit, 2024). Both ends are exact: at 0 the layer computes what a
`torch.nn.Linear` computes, at 1 what it computes without a strength.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitllm.errors import ConfigError
from bitllm.ternary import Baseline
from bitllm.train.quantizers import (
    check_variant,
    quantize_activations,
    quantize_weights,
    round_weights,
    stored_scale,
    weight_scale,
)

__all__ = ["BitLinear"]


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in `dtype`, which holds levels and codes exactly; float16 would overflow in sums."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return left.to(dtype) @ right.to(dtype)


def _rescale(product: Tensor, a: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return product / a * scale in `dtype`; overwrites the product."""
    if a is None:
        return product.mul_(scale).to(dtype)
    if product.dtype == torch.float32:  # one operation after the other, as decoders do it
        return product.div_(a).mul_(scale).to(dtype)
    return product.mul_(scale / a)  # rounded once


def _gradients(
    ctx: Any, grad: Tensor, inputs: Tensor, levels: Tensor, scale: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [..., in] and w [out, in] where y = inputs @ (levels * scale).T."""
    x_dtype, weight_dtype = ctx.dtypes
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _rescale(_matmul(grad, levels, x_dtype), None, scale, x_dtype)
    if ctx.needs_input_grad[1]:
        rows, inputs = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        grad_weight = _matmul(rows.t(), inputs, x_dtype).to(weight_dtype)
    return grad_x, grad_weight


class _QuantizedProduct(torch.autograd.Function):
    """y = (q @ levels.T) / a * scale, with the gradients of x @ weight.T at the rounded values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, weight_bits: Baseline, round_inputs: bool
    ) -> Tensor:
        scale = weight_scale(weight, weight_bits)
        levels = round_weights(weight, scale, weight_bits)
        ctx.weight_bits = weight_bits
        ctx.dtypes = x.dtype, weight.dtype
        a = None
        if round_inputs:
            # Whole numbers below 2**24 in float32: the sum is exact in any order.
            q, a = quantize_activations(x)
            ctx.save_for_backward(weight, scale, q.to(torch.int8), a)
        else:
            q = x
            ctx.save_for_backward(weight, scale, x)
        return _rescale(_matmul(q, levels.t(), x.dtype), a, stored_scale(scale), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scale, inputs, *a = ctx.saved_tensors
        levels = round_weights(weight, scale, ctx.weight_bits)
        if a:
            inputs = inputs / a[0]
        return *_gradients(ctx, grad, inputs, levels, stored_scale(scale)), None, None


class _BlendedProduct(torch.autograd.Function):
    """The product between dense and quantised; `strength` is float32 [], 0 to 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        strength: Tensor,
        weight_bits: Baseline,
        round_inputs: bool,
    ) -> Tensor:
        ctx.variant = weight_bits, round_inputs
        ctx.dtypes = x.dtype, weight.dtype
        ctx.save_for_backward(x, weight, strength)
        inputs, a, levels, scale = _blend(x, weight, strength, weight_bits, round_inputs)
        return _rescale(_matmul(inputs, levels.t(), x.dtype), a, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, strength = ctx.saved_tensors
        inputs, a, levels, scale = _blend(x, weight, strength, *ctx.variant)
        inputs = inputs if a is None else inputs / a
        return *_gradients(ctx, grad, inputs, levels, scale), None, None, None


def _blend(
    x: Tensor, weight: Tensor, strength: Tensor, weight_bits: Baseline, round_inputs: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return inputs, their scale, levels and their scale, with `strength` of the rounding done.

    The rounding is blended in units of a level, so that at 1 the values are whole numbers; at 0
    the unit is 1, so that they are those of the dense layer.
    """
    strength = strength.float()
    quantized = strength > 0
    levels, scale = quantize_weights(weight, weight_bits)
    scale = torch.where(quantized, scale, 1.0)
    levels = torch.lerp(weight.float() / scale, levels, strength)
    if not round_inputs:
        return x, None, levels, scale
    q, a = quantize_activations(x)
    a = torch.where(quantized, a, 1.0)
    return torch.lerp(x.float() * a, q, strength), a, levels, scale


class BitLinear(nn.Linear):
    """A linear layer with weights of few bits and int8 activations.

    Optimizers, checkpoints and sharding plans see an ordinary `nn.Linear`, whose `weight` holds the
    master weights [out, in]. Products are computed in the dtype of the input (under autocast, in
    that of autocast).

    Args:
        in_features: size of an input vector.
        out_features: size of an output vector.
        bias: whether to add a learned vector [out] that is not quantised.
        weight_bits: "1.58" for ternary weights; "1", "2", "4" or "8" for study (`quantizers`).
        activation_bits: 8, or None to leave the inputs as they are.
        norm_eps: epsilon of an RMSNorm with a gain, `rms_norm.weight` [in], before the inputs are
            rounded; None for no norm.
        strength: how far the layer is quantised, 0 (dense) to 1, to be changed by `set_strength`
            during training; None for a layer that is always quantised, which is faster.
        device: where the parameters live.
        dtype: type of the parameters.

    Raises:
        ConfigError: a quantisation that is not offered.
    """

    weight_bits: Baseline
    activation_bits: int | None
    rms_norm: nn.RMSNorm | None
    strength: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_bits: Baseline = "1.58",
        activation_bits: int | None = 8,
        norm_eps: float | None = None,
        strength: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._configure(weight_bits, activation_bits, norm_eps, strength)

    @classmethod
    def adopt(
        cls,
        linear: nn.Linear,
        *,
        weight_bits: Baseline = "1.58",
        activation_bits: int | None = 8,
        norm_eps: float | None = None,
        strength: float | None = None,
    ) -> BitLinear:
        """Turn a linear layer into this kind, in place: it stays the same object.

        Args:
            linear: the layer; its parameters and hooks stay as they are, and so does the norm of
                one that is of this kind already.
            weight_bits: these and the following as for `BitLinear`.
            activation_bits: see there.
            norm_eps: see there.
            strength: see there.

        Raises:
            ConfigError: a quantisation that is not offered.
        """
        check_variant(weight_bits, activation_bits)
        _check_strength(strength)
        if not isinstance(linear, BitLinear):
            linear.__class__ = cls
        assert isinstance(linear, BitLinear)
        linear._configure(weight_bits, activation_bits, norm_eps, strength)
        return linear

    def _configure(
        self,
        weight_bits: Baseline,
        activation_bits: int | None,
        norm_eps: float | None,
        strength: float | None,
    ) -> None:
        check_variant(weight_bits, activation_bits)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        if not hasattr(self, "rms_norm"):
            self.rms_norm = None
        if norm_eps is not None:
            norm = nn.RMSNorm(self.in_features, norm_eps, device=self.weight.device)
            self.rms_norm = norm.to(self.weight.dtype)
        _check_strength(strength)
        value = None if strength is None else torch.tensor(strength, device=self.weight.device)
        self.register_buffer("strength", value, persistent=False)

    def set_strength(self, strength: float) -> None:
        """Set how far the layer is quantised, 0 (dense) to 1, without recompiling anything.

        Raises:
            ConfigError: not in 0 .. 1, or the layer was made without a strength.
        """
        _check_strength(strength)
        if self.strength is None:
            raise ConfigError(
                "this layer is always quantised", hint="make it with strength=0.0 to change it"
            )
        self.strength.fill_(strength)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the quantised weights, [..., in] -> [..., out]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input.to(self.rms_norm.weight.dtype))
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        rounds = self.activation_bits is not None
        y: Tensor
        if self.strength is None:
            y = _QuantizedProduct.apply(input, self.weight, self.weight_bits, rounds)  # type: ignore[no-untyped-call]
        else:
            y = _BlendedProduct.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.strength, self.weight_bits, rounds
            )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rounded_weight(self) -> Tensor:
        """Return the weights that the layer multiplies with when fully quantised, [out, in]."""
        levels, scale = quantize_weights(self.weight.detach(), self.weight_bits)
        return (levels * scale).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        return (
            f"{super().extra_repr()}, weight_bits={self.weight_bits!r}, "
            f"activation_bits={self.activation_bits}"
        )


def _check_strength(strength: float | None) -> None:
    if strength is not None and not 0 <= strength <= 1:
        raise ConfigError(f"strength must lie in 0 .. 1, got {strength}")
