"""The native elementary functions give the bits of numerics.py."""

from __future__ import annotations

import numpy as np
import pytest

from bitllm import _native
from bitllm.backends import numerics

RANDOM = np.random.default_rng(5)


def assert_same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_exp():
    edges = [0.0, -0.0, 1.0, -86.99999, -87.0, -87.00001, 88.0, 88.5, 1e30, -1e30, -np.inf, np.inf]
    x = np.array([*edges, *RANDOM.uniform(-90, 90, 20000), *RANDOM.normal(0, 1, 5000)], np.float32)
    out = np.empty_like(x)
    _native.exp_f32(x, out)
    assert_same_bits(out, numerics.exp_f32(x))


def test_log():
    edges = [1.0, np.sqrt(0.5), np.sqrt(2), np.nextafter(np.sqrt(2), 0), 1e-300, 1e300, 2.0**-33]
    x = np.array([*edges, *np.exp(RANDOM.uniform(-700, 700, 20000)), *RANDOM.uniform(0, 1, 5000)])
    out = np.empty_like(x)
    _native.log_f64(x, out)
    assert_same_bits(out, numerics.log_f64(x))


def test_sine_and_cosine():
    quarters = np.arange(-9, 10) * (np.pi / 4)
    x = np.array([0.0, -0.0, *quarters, *RANDOM.uniform(-(2.0**24), 2.0**24, 20000)])
    x = np.concatenate([x, RANDOM.uniform(-10, 10, 5000)])
    sines, cosines = np.empty_like(x), np.empty_like(x)
    _native.sincos_f64(x, sines, cosines)
    expected = numerics.sincos_f64(x)
    assert_same_bits(sines, expected[0])
    assert_same_bits(cosines, expected[1])


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 0x123456789ABCDEF0])
def test_gumbel_noise(seed):
    ids = np.array([0, 1, 2, 3, 4, 128255, *RANDOM.integers(0, 2**31, 3000)], np.int32)
    out = np.empty(len(ids), np.float64)
    for choice, position in [(0, 0), (1, 0), (0, 1), (7, 2**31 - 1)]:
        _native.gumbel_noise(seed, choice, position, ids, out)
        assert_same_bits(out, numerics.gumbel_noise(seed, choice, position, ids))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 33, 1000])
def test_lane_sum(count):
    values = RANDOM.normal(0, 1, count).astype(np.float32)
    native = np.array([_native.lane_sum(values)], np.float32)
    assert_same_bits(native, numerics.lane_sum(values)[None])
