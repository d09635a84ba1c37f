"""The ternary number format in NumPy: the normative text that every kernel must match.

Weights are codes in {-1, 0, +1} times a float32 scale; activations are int8 codes divided by a
float32 factor of their token; the product of the codes is exact in int32.
"""

from bitllm.ternary.baselines import BASELINES, Baseline, reconstruct, round_to_baseline
from bitllm.ternary.distortion import Distortion
from bitllm.ternary.packing import pack, unpack
from bitllm.ternary.quantize import (
    Granularity,
    dequantize,
    matmul_int32,
    quantize_activations,
    quantize_weights,
)

__all__ = [
    "BASELINES",
    "Baseline",
    "Distortion",
    "Granularity",
    "dequantize",
    "matmul_int32",
    "pack",
    "quantize_activations",
    "quantize_weights",
    "reconstruct",
    "round_to_baseline",
    "unpack",
]
