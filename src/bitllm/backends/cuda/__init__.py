"""The CUDA backend: NVIDIA GPUs through PyTorch, its kernels written in Triton."""

from bitllm.backends.cuda.backend import CudaBackend
from bitllm.backends.cuda.decoder import CudaDecoder

__all__ = ["CudaBackend", "CudaDecoder"]
