"""Ternary products in PyTorch: int8 codes of activations, 2-bit codes of weights, exact sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from bitllm.backends.cuda.tensors import vector
from bitllm.checkpoint import Checkpoint, LinearSpec, TernaryMatrix
from bitllm.errors import QuantizationError

__all__ = [
    "Linear",
    "PackedMatrix",
    "check_codes",
    "check_scales",
    "quantize_activations",
    "rms_norm",
]


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the last axis, in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to int8 codes: a = 127 / max(absmax, 1e-5), q = round_half_even(x * a).

    Args:
        x: float32 [tokens, in].

    Returns:
        The codes, whole numbers in float32 [tokens, in] (NaN where x is no number), and a, float32
        [tokens, 1].
    """
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    a = torch.full_like(absmax, 127.0) / absmax  # a number / x is 127 * (1 / x), rounded twice
    return (x * a).round().clamp(-128.0, 127.0), a


def check_codes(packed: npt.NDArray[np.uint8], name: str) -> None:
    """Refuse packed bytes that hold the code 3.

    Raises:
        QuantizationError: they do; names the matrix.
    """
    if (packed & (packed >> 1) & 0b01010101).any():
        raise QuantizationError(
            f"{name} holds the code 3, which stands for no ternary weight",
            hint="the file is damaged or of another format than it says",
        )


def check_scales(scales: npt.NDArray[np.float32], name: str) -> None:
    """Refuse scales that are no numbers.

    Raises:
        QuantizationError: one is NaN or infinite; names the matrix.
    """
    if not np.isfinite(scales).all():
        raise QuantizationError(
            f"a scale of {name} is NaN or infinite",
            hint="the file is damaged; download it again",
        )


class PackedMatrix:
    """A ternary matrix in the canonical packing on a device.

    Args:
        matrix: in the canonical packing.
        name: of the matrix, for errors.
        device: where it is kept.

    Attributes:
        nbytes: bytes on the device.
    """

    def __init__(self, matrix: TernaryMatrix, name: str, device: torch.device) -> None:
        self._columns = matrix.in_features
        check_codes(matrix.packed, name)
        self._packed = torch.from_numpy(np.array(matrix.packed)).to(device)
        self._shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
        self.nbytes = self._packed.nbytes

    def codes(self) -> torch.Tensor:
        """Return the codes, each -1, 0 or 1, in float32 [out, in]."""
        spread = (self._packed[:, :, None] >> self._shifts) & 3
        return spread.flatten(1)[:, : self._columns].to(torch.float32) - 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply float32 [tokens, in] with the codes: float32 [tokens, out].

        Exact for whole numbers whose partial sums stay below 2^24, in whatever order.
        """
        return x @ self.codes().T


class Linear:
    """One ternary projection with its own norm and bias where the architecture has them.

    Attributes:
        nbytes: bytes of the matrix and its scales on the device.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, spec: LinearSpec, device: torch.device
    ) -> None:
        self._spec = spec
        matrix = checkpoint.ternary(name)
        check_scales(matrix.scales, f"{checkpoint.origin}: {name}")
        self.matrix = PackedMatrix(matrix, f"{checkpoint.origin}: {name}", device)
        self._scales = torch.from_numpy(np.array(matrix.scales)).to(device)
        self._group = matrix.group_size
        self._norm = None
        if spec.norm_eps is not None:
            self._norm = vector(checkpoint, f"{name}.norm", device)
        self._bias = vector(checkpoint, f"{name}.bias", device) if spec.bias else None
        self.nbytes = self.matrix.nbytes + self._scales.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Project float32 [tokens, in] to [tokens, out]: (codes @ q / a) * scale + bias."""
        if self._norm is not None and self._spec.norm_eps is not None:
            x = rms_norm(x, self._norm, self._spec.norm_eps)
        if self._spec.activation_bits is None:
            y = self._rescaled(x)
        else:
            codes, a = quantize_activations(x)
            y = self._rescaled(codes) / a
        return y if self._bias is None else y + self._bias

    def _rescaled(self, x: torch.Tensor) -> torch.Tensor:
        if self._group is None:
            return self.matrix(x) * self._scales
        scales = self._scales.repeat_interleave(self._group, dim=1)[:, : x.shape[1]]
        return x @ (self.matrix.codes() * scales).T
