"""The number format: exact rules on hand-made values, properties on random ones."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitllm.errors import QuantizationError
from bitllm.ternary import (
    dequantize,
    matmul_int32,
    pack,
    quantize_activations,
    quantize_weights,
    unpack,
)

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=37)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
MATRICES = arrays.arrays(np.float32, SHAPES, elements=FINITE)
CODES = arrays.arrays(np.int8, SHAPES, elements=st.integers(-1, 1))
INT8 = st.integers(-128, 127)
GRANULARITIES = [("tensor", None), ("row", None), ("group", 1), ("group", 5), ("group", 64)]

QUICK = settings(max_examples=60, deadline=None)


# Weights


def test_weights_are_rounded_by_their_mean_size():
    # mean |w| = 1, so that the codes are the weights rounded half to even and clamped.
    weights = np.array([[0.5, -0.5, 1.5], [-2.5, 0.5625, -0.4375]], np.float32)
    codes, scales = quantize_weights(weights)
    assert scales.shape == ()
    assert scales.dtype == np.float32
    assert scales == np.float32(1.0)
    assert codes.dtype == np.int8
    assert codes.tolist() == [[0, 0, 1], [-1, 1, 0]]


def test_rows_and_groups_have_scales_of_their_own():
    weights = np.array([[1, 1, 1, 8, -8], [2, 2, 2, 0, 0]], np.float32)
    codes, scales = quantize_weights(weights, granularity="row")
    assert scales.tolist() == [np.float32(3.8), np.float32(1.2)]
    assert codes.tolist() == [[0, 0, 0, 1, -1], [1, 1, 1, 0, 0]]
    codes, scales = quantize_weights(weights, granularity="group", group_size=3)
    assert scales.tolist() == [[1.0, 8.0], [2.0, float(np.float32(1e-5))]]
    assert codes.tolist() == [[1, 1, 1, 1, -1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_all_zero_weights_have_zero_codes_and_a_usable_scale(granularity, group_size):
    codes, scales = quantize_weights(
        np.zeros((3, 7), np.float32), granularity=granularity, group_size=group_size
    )
    assert not codes.any()
    assert (scales == np.float32(1e-5)).all()


def test_denormal_weights_are_zero():
    weights = np.full((2, 3), np.float32(1e-45))
    codes, scales = quantize_weights(weights)
    assert not codes.any()
    assert scales == np.float32(1e-5)


def test_the_largest_floats_are_ones():
    largest = np.finfo(np.float32).max
    codes, scales = quantize_weights(np.array([[largest, -largest]], np.float32))
    assert codes.tolist() == [[1, -1]]
    assert scales == largest


def test_the_mean_does_not_depend_on_the_order_of_the_weights():
    weights = np.ones((64, 4096), np.float32)
    weights[0, 0] = 2.0**25
    flipped = np.ascontiguousarray(weights[::-1, ::-1])
    assert (
        quantize_weights(weights)[1]
        == quantize_weights(flipped)[1]
        == np.float32(129.0) - (np.float32(2.0**-18))
    )


@QUICK
@given(MATRICES, st.sampled_from(GRANULARITIES))
def test_codes_are_ternary_and_scales_positive(weights, how):
    granularity, group_size = how
    codes, scales = quantize_weights(weights, granularity=granularity, group_size=group_size)
    rows, columns = weights.shape
    groups = {"tensor": (), "row": (rows,)}.get(granularity)
    assert scales.shape == (groups if groups is not None else (rows, -(-columns // group_size)))
    assert codes.shape == weights.shape
    assert set(np.unique(codes)) <= {-1, 0, 1}
    assert np.isfinite(scales).all()
    assert (scales >= np.float32(1e-5)).all()
    assert (codes * np.sign(weights) >= 0).all()


@QUICK
@given(CODES, st.floats(2.0**-12, 1024.0, width=32), st.sampled_from(GRANULARITIES))
def test_dense_signs_survive_a_round_trip(codes, scale, how):
    """Weights of one size per scale come back exactly; with zeros, the mean is not the size."""
    granularity, group_size = how
    codes = np.where(codes == 0, np.int8(1), codes)
    weights = codes.astype(np.float32) * np.float32(scale)
    again, scales = quantize_weights(weights, granularity=granularity, group_size=group_size)
    assert (again == codes).all()
    np.testing.assert_allclose(dequantize(again, scales, group_size), weights, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unbounded_weights_are_refused_by_place(bad):
    weights = np.zeros((3, 5), np.float32)
    weights[2, 1] = bad
    with pytest.raises(QuantizationError, match=r"weights hold -?(nan|inf) at \[2, 1\]"):
        quantize_weights(weights)


def test_float64_weights_beyond_float32_are_refused():
    with pytest.raises(QuantizationError, match=r"1e\+300"):
        quantize_weights(np.full((1, 1), 1e300))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4,), {}),
        ((2, 0), {}),
        ((2, 2), {"granularity": "group"}),
        ((2, 2), {"granularity": "row", "group_size": 2}),
        ((2, 2), {"granularity": "group", "group_size": 0}),
    ],
)
def test_contradictory_weight_requests_are_refused(shape, options):
    with pytest.raises(QuantizationError):
        quantize_weights(np.zeros(shape, np.float32), **options)


# Activations


def test_activations_are_rounded_half_to_even_in_float32():
    # max |x| = 127, so that a = 1.
    q, a = quantize_activations(np.array([127.0, 0.5, 1.5, -2.5, -126.5, 3.25], np.float32))
    assert a == np.float32(1.0)
    assert a.dtype == np.float32
    assert q.dtype == np.int8
    assert q.tolist() == [127, 0, 2, -2, -126, 3]


@pytest.mark.parametrize(
    ("largest", "code"), [(144, 64), (148, 64), (152, 63), (190, 63), (240, 63), (244, 63)]
)
def test_activations_are_multiplied_by_the_factor_not_divided_by_its_inverse(largest, code):
    """Half of the largest is nearly 63.5: x * (127 / m) and x / (m / 127) round it differently."""
    q, _ = quantize_activations(np.array([largest, largest / 2], np.float32))
    assert q.tolist() == [127, code]
    step = np.float32(largest) / np.float32(127)
    assert np.rint(np.float32(largest / 2) / step) != code


def test_each_token_has_its_own_factor():
    q, a = quantize_activations(np.array([[1.0, -0.5], [0.0, 0.0], [1e-6, 0.0]], np.float32))
    assert a.shape == (3,)
    assert q.tolist() == [[127, -64], [0, 0], [13, 0]]
    assert (a[1:] == np.float32(127) / np.float32(1e-5)).all()


@QUICK
@given(arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=33), elements=FINITE))
def test_quantised_activations_are_near_their_values(x):
    q, a = quantize_activations(x)
    assert q.shape == x.shape
    assert a.shape == x.shape[:-1]
    assert (np.abs(q.astype(np.int16)) <= 127).all()
    error = np.abs(q / a.astype(np.float64)[..., None] - x)
    assert (error <= 0.5001 / a.astype(np.float64)[..., None] + 1e-45).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unbounded_activations_are_refused(bad):
    with pytest.raises(QuantizationError, match=r"activations hold .* at \[1, 0\]"):
        quantize_activations(np.array([[1.0], [bad]], np.float32))


@pytest.mark.parametrize("x", [np.float32(1.0), np.zeros((3, 0), np.float32)])
def test_activations_without_features_are_refused(x):
    with pytest.raises(QuantizationError, match="features"):
        quantize_activations(x)


# Packing


def test_packing_puts_the_first_code_into_the_low_bits():
    codes = np.array([[1, 0, -1, -1, 0], [0, 1, 1, -1, 1]], np.int8)
    packed = pack(codes)
    assert packed.dtype == np.uint8
    # 2 + 1*4 + 0*16 + 0*64; then 1 and three paddings of 1: 1 + 4 + 16 + 64.
    assert packed.tolist() == [[6, 85], [1 + 2 * 4 + 2 * 16, 2 + 4 + 16 + 64]]


@QUICK
@given(CODES)
def test_packing_round_trip(codes):
    packed = pack(codes)
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] // 4))
    assert (unpack(packed, codes.shape[1]) == codes).all()


@pytest.mark.parametrize("column", range(5))
def test_code_three_is_refused_by_row(column):
    packed = pack(np.ones((6, 5), np.int8))
    packed[4, column // 4] |= 3 << (2 * (column % 4))
    with pytest.raises(QuantizationError, match="row 4 holds the code 3"):
        unpack(packed, 5)


@pytest.mark.parametrize("bad", [-2, 2, -128, 127])
def test_values_that_are_no_codes_are_refused_by_row(bad):
    codes = np.zeros((5, 9), np.int8)
    codes[3, 8] = bad
    with pytest.raises(QuantizationError, match="row 3 "):
        pack(codes)


@pytest.mark.parametrize("codes", [np.zeros(4, np.int8), np.zeros((2, 2), np.int32)])
def test_packing_takes_int8_matrices_only(codes):
    with pytest.raises(QuantizationError, match="int8"):
        pack(codes)


@pytest.mark.parametrize(("shape", "width"), [((2, 2), 9), ((2, 2), 4), ((2,), 8)])
def test_unpacking_checks_the_width(shape, width):
    with pytest.raises(QuantizationError, match="codes a row need"):
        unpack(np.full(shape, 85, np.uint8), width)


# Products


@QUICK
@given(CODES, st.integers(1, 4), st.data())
def test_products_are_exact(codes, tokens, data):
    q = data.draw(arrays.arrays(np.int8, (tokens, codes.shape[1]), elements=INT8))
    acc = matmul_int32(codes, q)
    assert acc.dtype == np.int32
    assert (acc == q.astype(np.int64) @ codes.astype(np.int64).T).all()


@pytest.mark.parametrize("columns", [131072, 131073])
def test_products_are_exact_at_the_edge_of_float32_integers(columns):
    codes = np.full((1, columns), -1, np.int8)
    q = np.full(columns, -128, np.int8)
    q[-1] = -127
    assert matmul_int32(codes, q).tolist() == [128 * columns - 1]


@pytest.mark.parametrize(
    ("codes", "q"),
    [
        (np.zeros((2, 3), np.int8), np.zeros(4, np.int8)),
        (np.zeros((2, 3), np.int8), np.zeros(3, np.float32)),
        (np.zeros(3, np.int8), np.zeros(3, np.int8)),
    ],
)
def test_products_of_what_does_not_fit_are_refused(codes, q):
    with pytest.raises(QuantizationError, match="do not fit"):
        matmul_int32(codes, q)


def test_dequantising_spreads_each_scale_over_what_it_covers():
    codes = np.array([[1, -1, 1], [0, 1, -1]], np.int8)
    by_row = dequantize(codes, np.array([2, 3], np.float32))
    assert by_row.tolist() == [[2, -2, 2], [0, 3, -3]]
    by_group = dequantize(codes, np.array([[2, 3], [4, 5]], np.float32), 2)
    assert by_group.tolist() == [[2, -2, 3], [0, 4, -5]]
    assert dequantize(codes, np.float32(0.5)).dtype == np.float32


@pytest.mark.parametrize(
    ("scales", "group_size"),
    [(np.ones(3, np.float32), None), (np.ones((2, 1), np.float32), 2), (np.float32(1), 2)],
)
def test_scales_that_do_not_fit_are_refused(scales, group_size):
    with pytest.raises(QuantizationError, match="do not fit"):
        dequantize(np.zeros((2, 3), np.int8), np.asarray(scales), group_size)
