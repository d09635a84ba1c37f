"""Loading: checks what the MLX decoder can run, then hands it the tensors one by one."""

from __future__ import annotations

from bitllm.backends.base import LoadOptions
from bitllm.backends.mlx.decoder import MlxDecoder
from bitllm.checkpoint import Checkpoint
from bitllm.errors import ConfigError, InsufficientMemoryError, UnsupportedModelError

__all__ = ["MlxBackend"]

_LARGEST_INPUT = (1 << 24) // 127  # whole numbers are exact in float32 up to 2^24


class MlxBackend:
    """Loads checkpoints into `MlxDecoder`."""

    name = "mlx"

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> MlxDecoder:
        """Load `checkpoint` into MLX arrays; `options.threads` has no meaning here.

        Raises:
            CheckpointError: a tensor is missing or broken, or of a kind that MLX does not run.
            ConfigError: `options` names a kernel set, packing or head that this backend lacks.
            InsufficientMemoryError: MLX could not get the memory.
        """
        _refuse_options(options)
        for name, linear in checkpoint.spec.linear_names():
            if linear.in_features > _LARGEST_INPUT:
                raise UnsupportedModelError(
                    f"{checkpoint.origin}: {name} has {linear.in_features} columns; "
                    f"exact products on the mlx device need {_LARGEST_INPUT} or fewer",
                    hint='use device="reference"',
                )
        try:
            return MlxDecoder(checkpoint, options)
        except (MemoryError, RuntimeError) as error:
            raise InsufficientMemoryError(
                f"{checkpoint.origin} does not fit into the memory of the device: {error}",
                hint="ask for a shorter context (kv_tokens)",
            ) from error


def _refuse_options(options: LoadOptions) -> None:
    if options.isa is not None:
        raise ConfigError(
            f"the mlx backend has no kernel set {options.isa!r}",
            hint="leave isa out, or use the cpu device",
        )
    if options.packing not in ("auto", "2bit"):
        raise ConfigError(
            f"the mlx backend holds ternary weights in 2 bits, not as {options.packing!r}",
            hint="leave packing out, or use the cpu device",
        )
    if options.head not in ("auto", "full"):
        raise ConfigError(
            f"the mlx backend computes the full head, not {options.head!r}",
            hint="leave head out, or use the cpu device",
        )
