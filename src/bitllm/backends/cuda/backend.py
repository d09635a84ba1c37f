"""Loading: checks that there is a GPU that runs the model, then hands it the tensors one by one."""

from __future__ import annotations

import torch

from bitllm.backends.base import LoadOptions
from bitllm.backends.cuda.decoder import CudaDecoder
from bitllm.checkpoint import Checkpoint
from bitllm.errors import (
    BackendUnavailableError,
    ConfigError,
    InsufficientMemoryError,
    UnsupportedModelError,
)

__all__ = ["CudaBackend"]

_LARGEST_INPUT = (1 << 24) // 127  # int32 accumulators pass through float32, exact up to 2^24
_OLDEST = (8, 0)  # compute capability: Ampere, the first with int8 tensor cores and bfloat16


class CudaBackend:
    """Loads checkpoints into `CudaDecoder`.

    Args:
        device: where to load to; None = the current GPU.
        kernels: compute with the Triton kernels; without, the same computation in plain PyTorch
            runs on the CPU too. With both, the kernels need Triton's interpreter.
    """

    name = "cuda"

    def __init__(self, device: torch.device | None = None, *, kernels: bool = True) -> None:
        self._device = device
        self._kernels = kernels

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> CudaDecoder:
        """Load `checkpoint` into the memory of the GPU; `options.threads` has no meaning here.

        Raises:
            BackendUnavailableError: there is no GPU, or none that is new enough.
            CheckpointError: a tensor is missing or broken, or of a kind that this does not run.
            ConfigError: `options` names a kernel set, packing or head that this backend lacks.
            InsufficientMemoryError: the GPU has too little memory.
        """
        _refuse_options(options)
        for name, linear in checkpoint.spec.linear_names():
            if linear.in_features > _LARGEST_INPUT:
                raise UnsupportedModelError(
                    f"{checkpoint.origin}: {name} has {linear.in_features} columns; "
                    f"exact products on the cuda device need {_LARGEST_INPUT} or fewer",
                    hint='use device="reference"',
                )
        try:
            device = self._device or _find_gpu()
            return CudaDecoder(checkpoint, options, device, kernels=self._kernels)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(
                f"{checkpoint.origin} does not fit into the memory of the GPU: {error}",
                hint="ask for a shorter context (kv_tokens)",
            ) from error

    @staticmethod
    def free_memory() -> int | None:
        """Return the bytes that the current GPU can still give; None = there is none."""
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def _find_gpu() -> torch.device:
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA GPU"
        raise BackendUnavailableError(
            f"the cuda device needs an NVIDIA GPU, but PyTorch {torch.__version__} {why}",
            hint="check `nvidia-smi`, install a CUDA build of PyTorch, or use device='cpu'",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        raise BackendUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; the cuda device needs 8.0 or newer",
            hint="use device='cpu'",
        )
    return device


def _refuse_options(options: LoadOptions) -> None:
    if options.isa is not None:
        raise ConfigError(
            f"the cuda backend has no kernel set {options.isa!r}",
            hint="leave isa out, or use the cpu device",
        )
    if options.packing not in ("auto", "2bit"):
        raise ConfigError(
            f"the cuda backend holds ternary weights in 2 bits, not as {options.packing!r}",
            hint="leave packing out, or use the cpu device",
        )
    if options.head not in ("auto", "full"):
        raise ConfigError(
            f"the cuda backend computes the full head, not {options.head!r}",
            hint="leave head out, or use the cpu device",
        )
