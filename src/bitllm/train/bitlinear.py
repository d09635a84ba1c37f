"""The ternary linear layer as it is trained: `BitLinear`, a drop-in `torch.nn.Linear`.

The forward pass is the deployed one, bit for bit: int8 activations times ternary codes, summed
exactly, divided by the activation scale and multiplied by the weight scale. The
backward pass takes both roundings for the identity (straight-through estimator, Bengio et
al., 2013), so that gradients reach the full-precision master weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BitLinear", "quantize_activations", "quantize_weights"]

_SMALLEST_SCALE = 1e-5


def quantize_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round master weights to ternary codes with one scale for the whole matrix.

    The codes are those of `bitllm.ternary.quantize_weights`. The scale is rounded to bfloat16, as
    a published checkpoint stores it, so that what is trained is what is deployed.

    Args:
        weight: floating point [out, in].

    Returns:
        codes float32 [out, in], each -1, 0 or +1, and the scale float32 [] that multiplies them.
    """
    values = weight.float()
    # In float64 the mean does not depend on the order of summation.
    mean = (values.abs().sum(dtype=torch.float64) / values.numel()).float()
    scale = mean.clamp(min=_SMALLEST_SCALE)
    codes = (values * (1.0 / scale)).round_().clamp_(-1, 1)
    return codes, scale.bfloat16().float()


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
    return (values * a).round_().clamp_(-128, 127), a


class _TernaryProduct(torch.autograd.Function):
    """y = (q @ codes.T) / a * scale, with the gradients of x @ weight.T at the rounded values."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, round_inputs: bool
    ) -> Tensor:
        codes, scale = quantize_weights(weight)
        if round_inputs:
            # Whole numbers below 2**24 in float32: the sum is exact in any order.
            q, a = quantize_activations(x)
            rounded = q / a
            product = (q @ codes.t()).div_(a)
        else:
            rounded = x.float()
            product = rounded @ codes.t()
        ctx.save_for_backward(rounded, codes, scale)
        ctx.dtypes = x.dtype, weight.dtype  # type: ignore[attr-defined]
        return product.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rounded, codes, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        x_dtype, weight_dtype = ctx.dtypes  # type: ignore[attr-defined]
        grad = grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x = (grad @ codes).mul_(scale).to(x_dtype)
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_weight = grad.flatten(0, -2).t() @ rounded.flatten(0, -2)
            grad_weight = grad_weight.to(weight_dtype)
        return grad_x, grad_weight, None


class BitLinear(nn.Linear):
    """A linear layer with ternary weights and int8 activations.

    Optimizers, checkpoints and sharding plans see an ordinary `nn.Linear`, whose `weight` holds the
    master weights [out, in].

    Args:
        in_features: size of an input vector.
        out_features: size of an output vector.
        bias: whether to add a learned vector [out] that is not quantised.
        activation_bits: 8, or None to leave the inputs as they are.
        device: where the parameters live.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_bits: int | None = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation_bits = activation_bits

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the ternary weights, [..., in] -> [..., out]."""
        round_inputs = self.activation_bits is not None
        y: Tensor = _TernaryProduct.apply(input, self.weight, round_inputs)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias
