"""Dense tensors of a checkpoint as PyTorch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bitllm.checkpoint import Checkpoint, DenseTensor
from bitllm.errors import FormatError

__all__ = ["to_torch", "vector"]


def to_torch(tensor: DenseTensor, device: torch.device) -> torch.Tensor:
    """Return a dense tensor in its own dtype on a device."""
    data: Any = np.array(tensor.data, order="C")  # a copy: PyTorch wants memory it may write to
    values = torch.from_numpy(data)
    return (values.view(torch.bfloat16) if tensor.dtype == "bf16" else values).to(device)


def vector(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
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
    return torch.from_numpy(np.array(values)).to(device)
