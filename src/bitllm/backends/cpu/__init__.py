"""The CPU backend: the native decoder, one C++ call a step."""

from bitllm.backends.cpu.backend import CpuBackend
from bitllm.backends.cpu.decoder import CpuDecoder

__all__ = ["CpuBackend", "CpuDecoder"]
