"""Dense tensors of a checkpoint as MLX arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from bitllm.checkpoint import Checkpoint, DenseTensor
from bitllm.errors import FormatError

__all__ = ["to_host", "to_mlx", "vector"]


def to_mlx(tensor: DenseTensor) -> mx.array:
    """Return a dense tensor in its own dtype; the values are copied."""
    data: Any = np.ascontiguousarray(tensor.data)
    array = mx.array(data)
    return array.view(mx.bfloat16) if tensor.dtype == "bf16" else array


def vector(checkpoint: Checkpoint, name: str) -> mx.array:
    """Return a norm or bias as float32.

    Raises:
        FormatError: it holds NaN or infinity.
        MissingTensorError: the checkpoint has no such tensor.
    """
    values = checkpoint.dense(name).to_float32()
    if not np.isfinite(values).all():
        raise FormatError(
            f"{checkpoint.origin}: {name} holds NaN or infinity",
            hint="the file is damaged; download it again",
        )
    return mx.array(values)


def to_host(array: mx.array) -> Any:
    """Compute an array and return it as a NumPy array."""
    return np.array(array)
