"""Every kernel set against the normative text in `bitllm.ternary`: the same integers and bits."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bitllm import _native, ops, ternary
from bitllm.errors import ConfigError, QuantizationError

ISAS = ops.kernel_names()
COLUMNS = [1, 3, 4, 15, 17, 63, 65, 97, 255, 256, 257, 640, 1000]


def codes_and_activations(rows: int, tokens: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(columns)
    codes = random.integers(-1, 2, (rows, columns)).astype(np.int8)
    return codes, random.integers(-128, 128, (tokens, columns)).astype(np.int8)


@pytest.mark.parametrize("columns", COLUMNS)
def test_packing_is_that_of_the_reference(columns):
    codes, _ = codes_and_activations(5, 1, columns)
    packed = ops.pack(codes)
    np.testing.assert_array_equal(packed, ternary.pack(codes))
    np.testing.assert_array_equal(ops.unpack(packed, columns), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_products_are_exact(columns, isa):
    for rows, tokens in [(1, 1), (17, 1), (3, 5), (300, 2)]:
        codes, q = codes_and_activations(rows, tokens, columns)
        product = ops.ternary_matmul(ops.pack(codes), q, isa=isa)
        assert product.dtype == np.int32
        np.testing.assert_array_equal(product, ternary.matmul_int32(codes, q))


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums_are_exact(isa):
    columns = (1 << 24) // 127
    for code in (-1, 1):
        codes = np.full((2, columns), code, np.int8)
        for value in (-128, 127):
            q = np.full((1, columns), value, np.int8)
            product = ops.ternary_matmul(ops.pack(codes), q, isa=isa)
            np.testing.assert_array_equal(product, [[code * value * columns] * 2])


@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_rounded_as_the_reference_rounds(isa):
    random = np.random.default_rng(1)
    for columns in COLUMNS:
        x = random.normal(0, 3, (4, columns)).astype(np.float32)
        x[1] = 0.0
        x[2] = np.float32(1e-42)
        x[3] = np.round(x[3] * 2) / 2  # many ties
        q, a = ops.quantize_activations(x, isa=isa)
        expected_q, expected_a = ternary.quantize_activations(x)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(a.view(np.uint32), expected_a.view(np.uint32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_prepared_products_are_exact(columns, packing, isa):
    for rows in (1, 17, 33, 300):
        codes, q = codes_and_activations(rows, 20, columns)
        packed = ops.pack(codes)
        matrix = ops.prepare(packed, columns, packing=packing, isa=isa)
        packed[:] = 0xFF  # it was copied
        assert matrix.shape == (rows, columns)
        expected = ternary.matmul_int32(codes, q)
        for tokens in (0, 1, 2, 5, 16, 17, 20):
            product = matrix.matmul(q[:tokens])
            assert product.dtype == np.int32
            np.testing.assert_array_equal(product, expected[:tokens])


def test_a_prepared_matrix_takes_any_leading_axes_and_order():
    codes, q = codes_and_activations(6, 12, 20)
    matrix = ops.prepare(np.asfortranarray(ops.pack(codes)))
    expected = ternary.matmul_int32(codes, q)
    np.testing.assert_array_equal(matrix.matmul(q[3]), expected[3])
    np.testing.assert_array_equal(
        matrix.matmul(q.reshape(3, 4, 20)[::-1]), expected.reshape(3, 4, 6)[::-1]
    )
    np.testing.assert_array_equal(
        matrix.matmul(q[:, ::-1]), ternary.matmul_int32(codes[:, ::-1].copy(), q)
    )
    assert matrix.matmul(q[:0]).shape == (0, 6)
    assert ops.prepare(ops.pack(codes)[:0]).matmul(q).shape == (12, 0)


def test_base3_takes_less_room():
    packed = ops.pack(np.zeros((100, 1280), np.int8))
    assert ops.prepare(packed).nbytes == 100 * 5 * 64
    assert ops.prepare(packed, packing="base3").nbytes == 100 * 4 * 64


def test_threads_may_share_a_prepared_matrix():
    codes, q = codes_and_activations(700, 24, 640)
    matrix = ops.prepare(ops.pack(codes))
    expected = ternary.matmul_int32(codes, q)
    with ThreadPoolExecutor(4) as pool:
        for token, product in enumerate(pool.map(matrix.matmul, list(q) * 8)):
            np.testing.assert_array_equal(product, expected[token % len(q)])


def test_the_memory_of_a_prepared_matrix_is_given_back():
    packed = np.full((4096, 1024), 0x55, np.uint8)  # 4 MiB
    ops.prepare(packed)
    before = _native.resident_bytes()
    for _ in range(20):
        ops.prepare(packed)
    assert _native.resident_bytes() - before < 20e6
    kept = [ops.prepare(packed) for _ in range(20)]
    assert _native.resident_bytes() - before > 60e6
    del kept
    assert _native.resident_bytes() - before < 20e6


def test_a_prepared_matrix_is_not_pickled_or_copied():
    matrix = ops.prepare(ops.pack(np.ones((2, 8), np.int8)))
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pickle the packed array"):
            act(matrix)


def test_a_matrix_that_cannot_be_prepared_is_refused():
    packed = np.full((2, 3), 0x55, np.uint8)
    for bad, columns in [
        (packed[0], None),
        (packed.astype(np.int8), None),
        (packed, 8),
        (packed, 13),
        (packed[:, :0], None),
        (packed, -3),
        (np.full((1, 33027), 0x55, np.uint8), None),
        (np.full((1, 3), 0xFF, np.uint8), None),
    ]:
        with pytest.raises(QuantizationError):
            ops.prepare(bad, columns)
    ops.prepare(packed, 9)
    with pytest.raises(ConfigError, match="'3bit'"):
        ops.prepare(packed, packing="3bit")
    with pytest.raises(ConfigError, match="mmx"):
        ops.prepare(packed, isa="mmx")
    matrix = ops.prepare(packed)
    for q in (np.zeros(11, np.int8), np.zeros(12, np.int16), np.zeros((), np.int8)):
        with pytest.raises(QuantizationError, match="do not fit"):
            matrix.matmul(q)


def test_leading_axes_are_kept():
    codes, q = codes_and_activations(6, 12, 20)
    packed, cube = ops.pack(codes), q.reshape(3, 4, 20)
    assert ops.ternary_matmul(packed, cube).shape == (3, 4, 6)
    np.testing.assert_array_equal(ops.ternary_matmul(packed, q[0]), (codes @ q[0].astype(np.int32)))
    x = q.reshape(2, 6, 20).astype(np.float64)[:, ::2]
    rounded, a = ops.quantize_activations(x)
    assert (rounded.shape, a.shape) == ((2, 3, 20), (2, 3))
    np.testing.assert_array_equal(rounded, ternary.quantize_activations(x)[0])
    assert ops.quantize_activations(x[0, 0])[1].shape == ()


def test_arrays_in_any_order_are_read_right():
    codes, q = codes_and_activations(8, 4, 40)
    packed = np.asfortranarray(ops.pack(codes))
    np.testing.assert_array_equal(
        ops.ternary_matmul(packed[::2], q[:, ::-1][:, ::-1]), ternary.matmul_int32(codes[::2], q)
    )


def test_what_is_no_ternary_code_is_refused():
    with pytest.raises(QuantizationError, match="-1, 0 or 1"):
        ops.pack(np.array([[0, 2]], np.int8))
    wrong = np.array([[0xFF]], np.uint8)
    with pytest.raises(QuantizationError, match="no ternary code"):
        ops.unpack(wrong, 4)
    with pytest.raises(QuantizationError, match="no ternary code"):
        ops.ternary_matmul(wrong, np.ones((1, 4), np.int8))


def test_what_does_not_fit_is_refused():
    packed, q = np.zeros((2, 3), np.uint8), np.zeros((1, 12), np.int8)
    for bad_packed, bad_q in [
        (packed[0], q),
        (packed.astype(np.int8), q),
        (packed, q.astype(np.int16)),
        (packed, q[:, :8]),
        (packed[:, :0], q[:, :0]),
    ]:
        with pytest.raises(QuantizationError, match="do not fit"):
            ops.ternary_matmul(bad_packed, bad_q)
    too_wide = np.zeros((1, (1 << 24) // 127 + 1), np.int8)
    with pytest.raises(QuantizationError, match="columns"):
        ops.ternary_matmul(np.full((1, -(-too_wide.shape[1] // 4)), 0x55, np.uint8), too_wide)
    with pytest.raises(QuantizationError, match="int8"):
        ops.pack(np.zeros((2, 3), np.float32))
    with pytest.raises(QuantizationError, match="13 codes a row"):
        ops.unpack(packed, 13)
    for x in (np.float32(1.0), np.zeros((2, 0), np.float32)):
        with pytest.raises(QuantizationError, match="features"):
            ops.quantize_activations(np.asarray(x))
    for value in (np.nan, np.inf, 1e300):
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            ops.quantize_activations(np.array([1.0, value]))


def test_an_unknown_kernel_set_is_refused():
    with pytest.raises(ConfigError, match="mmx") as caught:
        ops.ternary_matmul(np.full((1, 1), 0x55, np.uint8), np.ones((1, 4), np.int8), isa="mmx")
    assert "scalar" in str(caught.value)
