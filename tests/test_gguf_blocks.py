"""Block types of GGUF files: byte-level vectors, and the `gguf` package as the oracle."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from bitllm.errors import FormatError
from bitllm.formats.gguf.dense_blocks import decode_quantized
from bitllm.formats.gguf.ggml_types import GGML_TYPES, TYPE_NAMES, GgmlType
from bitllm.formats.gguf.scales import settle_scales
from bitllm.formats.gguf.ternary_blocks import TernaryBlocks, decode_ternary, i2s_codes
from bitllm.ternary import dequantize as ternary_values
from bitllm.ternary import unpack
from gguf_files import encode

TERNARY = ("I2_S", "TQ1_0", "TQ2_0", "Q2_0", "Q2_0_G128", "PTQ1_0", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4")


def type_named(name: str) -> GgmlType:
    return next(kind for kind in GGML_TYPES[TYPE_NAMES[name]] if kind.name == name)


def random_codes(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("name", TERNARY)
@pytest.mark.parametrize("shape", [(4, 256), (12, 768), (8, 2816)])
def test_codes_and_scales_are_those_of_the_definition(name: str, shape: tuple[int, int]) -> None:
    codes = random_codes(shape)
    data = as_array(encode(name, codes, 0.375))
    kind = type_named(name)
    assert len(data) == kind.size(shape)
    found = settle_scales(decode_ternary(kind, data, shape))
    assert (unpack(found.packed, shape[1]) == codes).all()
    assert found.scales.shape == ()
    assert found.scales == np.float32(0.375)


@pytest.mark.parametrize("layout", ["x86_128", "arm_64", "row4"])
def test_each_layout_of_i2_s(layout: str) -> None:
    codes = random_codes((8, 384))
    data = as_array(encode("I2_S", codes, 1.5, layout))
    found = decode_ternary(type_named("I2_S"), data, codes.shape, layout)
    assert (unpack(found.packed, 384) == codes).all()


def test_i2_s_rows_that_straddle_blocks() -> None:
    codes = random_codes((32, 100))
    found = decode_ternary(type_named("I2_S"), as_array(encode("I2_S", codes)), codes.shape)
    assert (unpack(found.packed, codes.shape[1]) == codes).all()


def test_the_byte_vectors_of_the_definitions() -> None:
    # Codes 2, 1, 0, 2 at g, g + 32, g + 64, g + 96 are the byte 0x92 in I2_S, high bits first.
    packed = i2s_codes(np.full(32, 0x92, np.uint8), (1, 128), "x86_128")
    assert unpack(packed, 128)[0, ::32].tolist() == [1, 0, -1, 1]
    # In TQ2_0 the low bits come first: 0x92 is 2, 0, 1, 2.
    block = np.concatenate([np.full(64, 0x92, np.uint8), as_array(np.float16(2).tobytes())])
    found = decode_ternary(type_named("TQ2_0"), block, (1, 256))
    assert unpack(found.packed, 256)[0, ::32].tolist() == [1, -1, 0, 1] * 2
    assert found.scales.tolist() == [[2.0]]
    # In base 3 the digits 2, 1, 0, 2, 1 are 2 * 81 + 27 + 0 + 6 + 1 = 196 of 243.
    assert -(-196 * 256 // 243) == 207
    block = np.concatenate([np.full(52, 207, np.uint8), as_array(np.float16(1).tobytes())])
    found = decode_ternary(type_named("TQ1_0"), block, (1, 256))
    assert unpack(found.packed, 256)[0, :160:32].tolist() == [1, 0, -1, 1, 0]


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_values_are_those_of_the_gguf_package(name: str) -> None:
    random = np.random.default_rng(3)
    sizes = np.repeat(random.uniform(0.01, 3, (16, 4)).astype(np.float16), 256, axis=1)
    weights = random_codes((16, 1024)) * sizes.astype(np.float32)
    kind = getattr(gguf.GGMLQuantizationType, name)
    stored = quantize(weights, kind)
    found = settle_scales(decode_ternary(type_named(name), stored.ravel(), weights.shape))
    codes = unpack(found.packed, 1024)
    values = ternary_values(codes, found.scales, found.group_size)
    assert found.group_size == 256
    assert (values == dequantize(stored, kind)).all()
    assert (values == weights).all()


@pytest.mark.parametrize("name", ["TQ1_0"])
def test_any_byte_reads_as_the_gguf_package_reads_it(name: str) -> None:
    raw = np.random.default_rng(4).integers(0, 256, (8, 54), np.uint8)
    raw[:, -2:] = as_array(np.float16(1).tobytes())
    found = decode_ternary(type_named(name), raw.ravel(), (8, 256))
    assert (unpack(found.packed, 256) == dequantize(raw, gguf.GGMLQuantizationType.TQ1_0)).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q6_K", "Q4_K"])
def test_dense_values_are_those_of_the_gguf_package_to_the_bit(name: str) -> None:
    kind = type_named(name)
    raw = np.random.default_rng(5).integers(0, 256, (33, 7 * kind.block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # random scales may be NaN
        wanted = dequantize(raw, getattr(gguf.GGMLQuantizationType, name))
        found = decode_quantized(kind, raw.ravel(), (33, 7 * kind.block))
    assert (found.view(np.uint32) == wanted.view(np.uint32)).all()


def test_the_sizes_of_types_are_those_of_the_gguf_package() -> None:
    forks = {36, 37, 38, 42, 43, 134, 135, 142, 143, 335}
    forks |= {9}  # Q8_1 is never in a file; the package has the size of an older one
    for id, kinds in GGML_TYPES.items():
        if id not in forks:
            kind = gguf.GGMLQuantizationType(id)
            assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (
                kinds[0].name,
                kinds[0].block,
                kinds[0].block_bytes,
            )
    assert {kind.value for kind in gguf.GGMLQuantizationType} - forks <= set(GGML_TYPES)


@pytest.mark.parametrize(
    "name", [name for name in TERNARY if name not in ("TQ1_0", "PTQ1_0", "IQ1_BN")]
)
def test_the_code_three_is_refused_with_its_row(name: str) -> None:
    kind = type_named(name)
    data = as_array(encode(name, random_codes((8, 512)))).copy()
    # The bytes of codes in the second half of the tensor, where there is no scale.
    place = {"I2_S": 512 * 5 // 4 + 1, "IQ2_BN_R4": len(data) - 40}.get(
        name, len(data) * 5 // 8 + 20
    )
    data[place] = 0xFF
    with pytest.raises(FormatError, match=r"row [4567] holds the code 3"):
        decode_ternary(kind, data, (8, 512))


def test_layouts_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(FormatError, match="blocks of 128"):
        i2s_codes(np.zeros(24, np.uint8), (1, 96), "x86_128")
    with pytest.raises(FormatError, match="row4") as caught:
        i2s_codes(np.zeros(96, np.uint8), (3, 128), "row4")
    assert "BITLLM_I2S_LAYOUT" in str(caught.value.hint)


def settled(scales: object, group_size: int | None = None) -> TernaryBlocks:
    values = np.asarray(scales, np.float32)
    packed = np.zeros((2, 128), np.uint8)
    return settle_scales(TernaryBlocks(packed, values, group_size))


def test_scales_are_as_few_as_they_can_be() -> None:
    assert settled([[2, 2], [2, 2]], 256).scales.shape == ()
    rows = settled([[2, 2], [3, 0]], 256)
    assert (rows.scales.tolist(), rows.group_size) == ([2, 3], None)
    groups = settled([[2, 1], [3, 0]], 256)
    assert (groups.scales.tolist(), groups.group_size) == ([[2, 1], [3, 1]], 256)
    assert settled([2, 2]).scales == 2
    assert settled([0, 0]).scales == 1


def test_where_the_scale_is_zero_the_codes_become_zero() -> None:
    found = settle_scales(
        TernaryBlocks(np.zeros((2, 128), np.uint8), np.array([[1, 0], [1, 1]], np.float32), 256)
    )
    codes = unpack(found.packed, 512)
    assert (codes[0, 256:] == 0).all()
    assert (codes[0, :256] == -1).all()
    assert (codes[1] == -1).all()


@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf])
def test_scales_that_are_no_positive_numbers_are_refused(scale: float) -> None:
    with pytest.raises(FormatError, match="no positive number"):
        settled([1, scale])
