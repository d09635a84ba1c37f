"""Metal kernels of our own: chosen where Metal is present and a self-test finds them right."""

from bitllm.backends.mlx.kernels.choice import use_kernels
from bitllm.backends.mlx.kernels.head import head_logits
from bitllm.backends.mlx.kernels.product import ternary_product
from bitllm.backends.mlx.kernels.quantize import quantize_packed

__all__ = ["head_logits", "quantize_packed", "ternary_product", "use_kernels"]
