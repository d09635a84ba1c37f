"""The tensor types of GGUF files: ids, sizes, and what is read of them.

Forks have given the same id to different types, so an id is a list of candidates; which one a file
means is told by how many bytes its tensors take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["GGML_TYPES", "TYPE_NAMES", "UNSIZED_TYPES", "GgmlType"]

TypeKind = Literal["float", "quantized", "ternary", "refused"]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type: `block` values along a row take `block_bytes`.

    Attributes:
        name: as the programs that write it call it.
        block: values of a block; rows are whole blocks.
        block_bytes: bytes of a block.
        kind: "float" is mapped, "quantized" decoded to floats, "ternary" read as codes and scales,
            "refused" recognised only.
        row_bytes: bytes in front of each row.
        tail_bytes: bytes behind the whole tensor.
        advice: the way out, for a type that is refused.
    """

    name: str
    block: int
    block_bytes: int
    kind: TypeKind = "refused"
    row_bytes: int = 0
    tail_bytes: int = 0
    advice: str = "fetch the model in another type, or its safetensors version"

    def size(self, shape: tuple[int, ...]) -> int | None:
        """Return the bytes of a tensor of this shape, None if its rows are no whole blocks."""
        rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
        if self.row_bytes == 0 and self.tail_bytes:  # blocks go on across the ends of rows
            rows, columns = 1, rows * columns
        if columns % self.block:
            return None
        return rows * (self.row_bytes + columns // self.block * self.block_bytes) + self.tail_bytes


_LOOKUP = (
    "its tiles depend on parameters that are not in the file; fetch the I2_S or the safetensors "
    "version of the model"
)
_OLD = "the file is from before October 2024; convert the model again"
_INTEGERS = "no weights of a language model have this type"
_DENSE = "the weights are those of a dense model; bitllm runs ternary ones"

GGML_TYPES: Mapping[int, tuple[GgmlType, ...]] = {
    0: (GgmlType("F32", 1, 4, "float"),),
    1: (GgmlType("F16", 1, 2, "float"),),
    2: (GgmlType("Q4_0", 32, 18, "quantized"),),
    3: (GgmlType("Q4_1", 32, 20, advice=_DENSE),),
    6: (GgmlType("Q5_0", 32, 22, advice=_DENSE),),
    7: (GgmlType("Q5_1", 32, 24, advice=_DENSE),),
    8: (GgmlType("Q8_0", 32, 34, "quantized"),),
    9: (GgmlType("Q8_1", 32, 36, advice=_DENSE),),
    10: (GgmlType("Q2_K", 256, 84, advice=_DENSE),),
    11: (GgmlType("Q3_K", 256, 110, advice=_DENSE),),
    12: (GgmlType("Q4_K", 256, 144, "quantized"),),
    13: (GgmlType("Q5_K", 256, 176, advice=_DENSE),),
    14: (GgmlType("Q6_K", 256, 210, "quantized"),),
    15: (GgmlType("Q8_K", 256, 292, advice=_DENSE),),
    16: (GgmlType("IQ2_XXS", 256, 66, advice=_DENSE),),
    17: (GgmlType("IQ2_XS", 256, 74, advice=_DENSE),),
    18: (GgmlType("IQ3_XXS", 256, 98, advice=_DENSE),),
    19: (GgmlType("IQ1_S", 256, 50, advice=_DENSE),),
    20: (GgmlType("IQ4_NL", 32, 18, advice=_DENSE),),
    21: (GgmlType("IQ3_S", 256, 110, advice=_DENSE),),
    22: (GgmlType("IQ2_S", 256, 82, advice=_DENSE),),
    23: (GgmlType("IQ4_XS", 256, 136, advice=_DENSE),),
    24: (GgmlType("I8", 1, 1, advice=_INTEGERS),),
    25: (GgmlType("I16", 1, 2, advice=_INTEGERS),),
    26: (GgmlType("I32", 1, 4, advice=_INTEGERS),),
    27: (GgmlType("I64", 1, 8, advice=_INTEGERS),),
    28: (GgmlType("F64", 1, 8, advice=_INTEGERS),),
    29: (GgmlType("IQ1_M", 256, 56, advice=_DENSE),),
    30: (GgmlType("BF16", 1, 2, "float"),),
    34: (GgmlType("TQ1_0", 256, 54, "ternary"),),
    35: (GgmlType("TQ2_0", 256, 66, "ternary"),),
    36: (
        GgmlType("I2_S", 4, 1, "ternary", tail_bytes=32),
        GgmlType("IQ4_NL_4_4", 32, 18, advice=_DENSE),
    ),
    37: (
        GgmlType("I8_S", 1, 1, tail_bytes=32, advice=_INTEGERS),
        GgmlType("IQ4_NL_4_8", 32, 18, advice=_DENSE),
    ),
    38: (
        GgmlType("TL1", 4, 1, tail_bytes=32, advice=_LOOKUP),
        GgmlType("IQ4_NL_8_8", 32, 18, advice=_DENSE),
    ),
    39: (GgmlType("MXFP4", 32, 17, advice=_DENSE),),
    40: (GgmlType("NVFP4", 64, 36, advice=_DENSE),),
    41: (GgmlType("Q1_0", 128, 18, advice=_DENSE),),
    42: (
        GgmlType("Q2_0", 64, 18, "ternary"),
        GgmlType("Q2_0_G128", 128, 34, "ternary"),
        GgmlType("STQ1_0", 256, 42),
    ),
    43: (GgmlType("STQ1_0", 256, 42),),
    134: (
        GgmlType("IQ1_BN", 64, 13, "ternary", row_bytes=2),
        GgmlType("IQ1_BN without scales of rows", 64, 13, advice=_OLD),
    ),
    135: (
        GgmlType("IQ2_BN", 64, 16, "ternary", row_bytes=4),
        GgmlType("IQ2_BN without scales of rows", 64, 16, advice=_OLD),
    ),
    142: (GgmlType("Q2_0_G128", 128, 34, "ternary"),),
    143: (GgmlType("PTQ1_0", 128, 28, "ternary"),),
    335: (GgmlType("IQ2_BN_R4", 64, 16, "ternary", row_bytes=4),),
}  # fmt: skip
"""What each id may mean, the likeliest first. Sizes of upstream's types are those of ggml."""

UNSIZED_TYPES: Mapping[int, GgmlType] = {
    38: GgmlType("TL1", 1, 0, advice=_LOOKUP),
    39: GgmlType("TL2", 1, 0, advice=_LOOKUP),
    42: GgmlType("TL2", 1, 0, advice=_LOOKUP),
}
"""What an id means where no candidate has the size of the tensors: types of padded tiles."""

TYPE_NAMES: Mapping[str, int] = {
    kind.name: id for id, kinds in reversed(list(GGML_TYPES.items())) for kind in reversed(kinds)
}
"""The id under which each type is written."""
