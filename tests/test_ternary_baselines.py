"""Baselines and distortion: hand-made values, the definition written out, and known optima."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitllm.errors import QuantizationError
from bitllm.ternary import (
    BASELINES,
    Distortion,
    dequantize,
    quantize_weights,
    reconstruct,
    round_to_baseline,
)

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=19)
VALUES = st.floats(-(2.0**20), 2.0**20, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x)
MATRICES = arrays.arrays(np.float32, SHAPES, elements=VALUES)
SHARED = [("tensor", None), ("row", None), ("group", 1), ("group", 5), ("group", 64)]
WHOLE = slice(None)


def groups_of(matrix: np.ndarray, granularity: str, size: int | None) -> Any:
    """Yield the slices that share a scale, and where in the scales that one is."""
    if granularity == "tensor":
        yield np.s_[:, :], ()
        return
    width = size or matrix.shape[1]
    for row in range(len(matrix)):
        for index, start in enumerate(range(0, matrix.shape[1], width)):
            place = (row,) if granularity == "row" else (row, index)
            yield np.s_[row : row + 1, start : start + width], place


def test_one_bit_by_hand() -> None:
    weights = np.array([[0.5, -1.5, 0.0, 2.0]], np.float32)
    levels, scale = round_to_baseline(weights, "1")
    assert levels.tolist() == [[1, -1, 1, 1]]
    assert scale == np.float32(1.0)


def test_four_bits_by_hand() -> None:
    """The largest weight is level 7; halves go to the even level."""
    weights = np.array([[7.0, 0.5, 1.5, -2.5, -7.0, 3.4]], np.float32)
    levels, scale = round_to_baseline(weights, "4")
    assert scale == np.float32(1.0)
    assert levels.tolist() == [[7, 0, 2, -2, -7, 3]]


def test_two_bits_are_three_levels_by_the_largest_weight() -> None:
    weights = np.array([[1.0, 0.5, 0.51, -0.6, 0.1]], np.float32)
    levels, scale = round_to_baseline(weights, "2")
    assert scale == np.float32(1.0)
    assert levels.tolist() == [[1, 0, 1, -1, 0]]


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from(SHARED))
def test_ternary_is_that_of_the_number_format(weights: np.ndarray, shared: Any) -> None:
    granularity, size = shared
    wanted = quantize_weights(weights, granularity=granularity, group_size=size)
    found = round_to_baseline(weights, "1.58", granularity=granularity, group_size=size)
    assert (found[0] == wanted[0]).all()
    assert (found[1] == wanted[1]).all()
    rounded = reconstruct(*found, WHOLE, size)
    assert (rounded == dequantize(*wanted, size)).all()


@settings(max_examples=80, deadline=None)
@given(MATRICES, st.sampled_from(SHARED), st.sampled_from(["2", "4", "8"]))
def test_no_weight_is_further_from_its_level_than_half_a_step(
    weights: np.ndarray, shared: Any, bits: Any
) -> None:
    granularity, size = shared
    levels, scales = round_to_baseline(weights, bits, granularity=granularity, group_size=size)
    most = {"2": 1, "4": 7, "8": 127}[bits]
    assert np.abs(levels.astype(int)).max() <= most
    rounded = reconstruct(levels, scales, WHOLE, size)
    for where, place in groups_of(weights, granularity, size):
        scale = float(scales[place])
        largest = float(np.abs(weights[where]).max())
        assert scale == pytest.approx(max(largest / most, 1e-30), rel=1e-6)
        difference = np.abs(rounded[where].astype(float) - weights[where].astype(float))
        assert difference.max() <= scale * (0.5 + 1e-4)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from(SHARED))
def test_no_other_scale_of_signs_is_nearer(weights: np.ndarray, shared: Any) -> None:
    """The derivative of the squared error vanishes at the mean size."""
    granularity, size = shared
    levels, scales = round_to_baseline(weights, "1", granularity=granularity, group_size=size)
    assert set(np.unique(levels).tolist()) <= {-1, 1}
    for where, place in groups_of(weights, granularity, size):
        signs, values = levels[where].astype(float), weights[where].astype(float)
        slope = ((float(scales[place]) * signs - values) * signs).sum()
        assert abs(slope) <= 1e-5 * np.abs(values).sum()


def test_more_bits_are_nearer_and_ternary_of_noise_is_what_theory_says() -> None:
    """Gaussian weights: signs keep 2 / pi of the power, an SQNR of 10 log10(1 / (1 - 2 / pi))."""
    weights = np.random.default_rng(0).standard_normal((400, 1000)).astype(np.float32)
    found = {}
    for bits in BASELINES:
        levels, scales = round_to_baseline(weights, bits)
        found[bits] = Distortion()
        found[bits].add(weights, reconstruct(levels, scales, WHOLE))
    assert found["1"].sqnr_db == pytest.approx(10 * math.log10(1 / (1 - 2 / math.pi)), abs=0.03)
    assert found["1"].cosine == pytest.approx(math.sqrt(2 / math.pi), abs=1e-3)
    assert found["1"].sqnr_db < found["1.58"].sqnr_db < found["4"].sqnr_db < found["8"].sqnr_db
    # Levels at half the largest of 400000 weights: nearly all of them are rounded to zero.
    assert found["2"].zero_fraction > 0.95
    edge = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert found["1.58"].zero_fraction == pytest.approx(edge, abs=2e-3)


def test_distortion_is_its_definition_whatever_the_pieces() -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((7, 9)).astype(np.float32)
    v = np.round(w).astype(np.float32)
    pieces, whole = Distortion(), Distortion()
    whole.add(w, v)
    for row in range(7):
        pieces.add(w[row], v[row])
    wide, rounded = w.astype(float), v.astype(float)
    assert whole.mse == pytest.approx(((wide - rounded) ** 2).mean(), rel=1e-12)
    noise = ((wide - rounded) ** 2).sum()
    assert whole.sqnr_db == pytest.approx(10 * np.log10((wide**2).sum() / noise), rel=1e-12)
    cosine = (wide * rounded).sum() / np.linalg.norm(wide) / np.linalg.norm(rounded)
    assert whole.cosine == pytest.approx(cosine, rel=1e-12)
    assert whole.zero_fraction == (v == 0).mean()
    assert pieces.mse == pytest.approx(whole.mse, rel=1e-12)
    assert pieces.count == 63


def test_distortion_at_its_ends() -> None:
    same, nothing = Distortion(), Distortion()
    ones = np.ones(4, np.float32)
    same.add(ones, ones)
    nothing.add(ones, 0 * ones)
    assert (same.sqnr_db, same.cosine, same.zero_fraction) == (math.inf, 1.0, 0.0)
    assert (nothing.sqnr_db, nothing.cosine, nothing.zero_fraction) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (np.ones((2, 2), np.float32), {"bits": "3"}),
        (np.full((2, 2), np.nan, np.float32), {"bits": "4"}),
        (np.full((2, 2), np.inf, np.float32), {"bits": "1"}),
        (np.ones(3, np.float32), {"bits": "8"}),
        (np.ones((2, 2), np.float32), {"bits": "8", "granularity": "group"}),
        (np.ones((2, 2), np.float32), {"bits": "8", "group_size": 2}),
    ],
)
def test_what_cannot_be_rounded_is_refused(weights: np.ndarray, options: Any) -> None:
    with pytest.raises(QuantizationError):
        round_to_baseline(weights, **options)
