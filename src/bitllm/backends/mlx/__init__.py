"""The MLX backend: Apple GPUs through Metal, and any CPU that MLX runs on."""

from bitllm.backends.mlx.backend import MlxBackend
from bitllm.backends.mlx.decoder import MlxDecoder

__all__ = ["MlxBackend", "MlxDecoder"]
