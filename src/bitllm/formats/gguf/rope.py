"""RoPE with a table: `rope_freqs.weight` says by what each frequency is divided.

Converters write it for the scaling of Llama 3.1, whose parameters they do not keep. They are found
again here, and the table they give is compared with that of the file.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import RopeSpec
from bitllm.errors import FormatError, UnsupportedModelError
from bitllm.formats.gguf.shards import GgufModel

__all__ = ["ROPE_FREQS", "read_rope", "rope_divisors"]

ROPE_FREQS = "rope_freqs.weight"
_TOLERANCE = 1e-5  # converters compute the table in float32, in another order than decoders
_CONTEXTS = tuple(1 << bits for bits in range(5, 24))
_LOW, _HIGH = 1.0, 4.0  # of all published models

F32 = npt.NDArray[np.float32]


def read_rope(model: GgufModel, theta: float, dim: int) -> RopeSpec:
    """Return the RoPE that the model's table stands for.

    Args:
        model: has a tensor `rope_freqs.weight`, F32 [dim / 2].
        theta: base of the frequencies.
        dim: dimensions of a head that are turned.

    Raises:
        FormatError: a table of another shape or type, or of impossible values.
        UnsupportedModelError: it is not the scaling of Llama 3.1.
    """
    tensor = model.tensors[ROPE_FREQS]
    if tensor.type.name != "F32" or tensor.shape != (dim // 2,):
        raise FormatError(
            f"{model.path}: {ROPE_FREQS} should be F32 [{dim // 2}], "
            f"but is {tensor.type.name} {[*tensor.shape]}"
        )
    table = model.bytes(ROPE_FREQS).view("<f4").astype(np.float32)
    if not (np.isfinite(table) & (table > 0)).all():
        raise FormatError(f"{model.path}: {ROPE_FREQS} holds values that are no positive numbers")
    for spec in _candidates(table, theta, dim):
        if np.allclose(rope_divisors(spec), table, rtol=_TOLERANCE, atol=0):
            return spec
    raise UnsupportedModelError(
        f"{model.path}: {ROPE_FREQS} is not the RoPE scaling of Llama 3",
        hint="use the safetensors version of the model",
    )


def rope_divisors(spec: RopeSpec) -> F32:
    """Return what `rope_freqs.weight` holds for this RoPE, float32 [dim / 2]."""
    plain = RopeSpec(spec.theta, spec.dim).inverse_frequencies()
    return (plain / spec.inverse_frequencies()).astype(np.float32)


def _candidates(table: F32, theta: float, dim: int) -> list[RopeSpec]:
    largest = float(str(table.max()))
    if (table == 1).all():
        return [RopeSpec(theta, dim)]
    if (table == table[0]).all():
        return [RopeSpec(theta, dim, "linear", largest)]
    factors = {largest, float(round(largest))} - {0.0}
    return [
        RopeSpec(theta, dim, "llama3", factor, _LOW, _HIGH, context)
        for factor in factors
        for context in _CONTEXTS
    ]
