"""The elementary functions against NumPy's own and published vectors."""

from __future__ import annotations

import numpy as np
import pytest

from bitllm.backends.numerics import (
    exp_f32,
    gumbel_noise,
    lane_sum,
    log_f64,
    philox4x32,
    sincos_f64,
)


def test_lane_sum_adds_in_sixteen_lanes():
    x = np.random.default_rng(1).normal(size=(3, 37)).astype(np.float32)
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(x[1]):
        lanes[i % 16] = lanes[i % 16] + value
    for width in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + width] for i in range(width)]
    assert lane_sum(x)[1] == lanes[0]
    assert lane_sum(x).shape == (3,)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
def test_lane_sum_of_any_length(count):
    x = np.arange(count, dtype=np.float32)
    assert lane_sum(x) == count * (count - 1) / 2


def test_exp_is_within_its_error():
    x = np.linspace(-87, 88, 20011, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp_f32(x) / exact - 1) < 2e-7).all()


def test_exp_at_the_edges():
    x = np.array([0.0, -0.0, -87.5, -1e30, -np.inf, 200.0], np.float32)
    clamped = exp_f32(np.float32([88.0]))[0]
    assert exp_f32(x).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, clamped]


def test_log_is_within_its_error():
    x = np.geomspace(1e-300, 1e300, 5001)
    x = np.concatenate([x, np.linspace(0.5, 2, 1001)])
    exact = np.log(x)
    assert (np.abs(log_f64(x) - exact) <= 2 * np.spacing(np.abs(exact)) + 1e-19).all()


def test_sine_and_cosine_are_within_their_error():
    x = np.concatenate([np.linspace(-10, 10, 2001), np.linspace(-(2**24), 2**24, 4001)])
    sine, cosine = sincos_f64(x)
    assert (np.abs(sine - np.sin(x)) < 1e-11).all()
    assert (np.abs(cosine - np.cos(x)) < 1e-11).all()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Known answers of the Random123 distribution for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    arrays = tuple(np.array([word], np.uint32) for word in counter)
    assert tuple(int(word[0]) for word in philox4x32(arrays, key)) == words


def test_gumbel_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(7, 0, 0, np.arange(40000, dtype=np.int32))
    # Distribution function exp(-exp(-x)) is uniform on (0, 1): Kolmogorov-Smirnov at p = 1e-3.
    uniform = np.sort(np.exp(-np.exp(-noise)))
    expected = (np.arange(40000) + 0.5) / 40000
    assert np.abs(uniform - expected).max() < 1.95 / 200


def test_gumbel_noise_belongs_to_each_id_alone():
    whole = gumbel_noise(2**40 + 3, 2, 9, np.arange(50, dtype=np.int32))
    some = np.array([49, 3, 17], np.int32)
    assert (gumbel_noise(2**40 + 3, 2, 9, some) == whole[some]).all()
    for other in ((3, 2, 9), (2**40 + 3, 1, 9), (2**40 + 3, 2, 8)):
        assert (gumbel_noise(*other, some) != whole[some]).all()
