"""The elementary functions of the numerics contract, in NumPy: the text the native code must match.

Everything is built from IEEE 754 additions, multiplications, divisions and comparisons in a fixed
order, without fused multiply-add, so that each platform computes the same bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "LANES",
    "exp_f32",
    "gumbel_noise",
    "lane_sum",
    "log_f64",
    "ordered_sum",
    "philox4x32",
    "sincos_f64",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]

LANES = 16
"""Float reductions run in 16 lanes: lane j adds elements j, j + 16, ... in order; then the upper
half of the lanes is added to the lower half, 16 -> 8 -> 4 -> 2 -> 1."""

_EXP_COEFFICIENTS = tuple(np.float32(1.0 / f) for f in (5040, 720, 120, 24, 6, 2, 1, 1))
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds half to even


def lane_sum(products: F32) -> F32:
    """Sum the last axis in the order of the numerics contract.

    Args:
        products: float32 [..., n].

    Returns:
        float32 [...].
    """
    *leading, n = products.shape
    step_count = -(-n // LANES)
    padded = np.zeros((*leading, step_count * LANES), np.float32)
    padded[..., :n] = products
    steps = padded.reshape(*leading, step_count, LANES)
    lanes = np.zeros((*leading, LANES), np.float32)
    for step in range(step_count):
        lanes = lanes + steps[..., step, :]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def ordered_sum(products: F32, axis: int) -> F32:
    """Sum an axis one after another, beginning with 0: ((0 + p[0]) + p[1]) + ...

    Args:
        products: float32 [..., n, ...].
        axis: the axis of n.

    Returns:
        float32, without that axis.
    """
    sums: F32 = np.add.accumulate(products, axis=axis, dtype=np.float32).take(-1, axis=axis)
    return sums + np.float32(0.0)  # a sum that begins with 0 is never -0


def exp_f32(x: F32) -> F32:
    """e**x for float32 [any shape], relative error below 2e-7.

    x is clamped to [-87, 88]; below -87 the result is exactly 0. With
    n = round_half_even(x * log2 e) and r = (x - n * ln2_high) - n * ln2_low, the result is
    P7(r) * 2**n, P7 the Taylor polynomial by Horner.
    """
    x = np.asarray(x, np.float32)
    clamped = np.minimum(np.maximum(x, np.float32(-87.0)), np.float32(88.0))
    n = (clamped * _LOG2_E + _ROUND_MAGIC) - _ROUND_MAGIC
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = p * r + coefficient
    power = ((n.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.where(x < np.float32(-87.0), np.float32(0.0), p * power).astype(np.float32)


def log_f64(x: F64) -> F64:
    """Natural logarithm of float64 [any shape], for normal x > 0; error below 2 ulp.

    x = m * 2**e with m in [sqrt(1/2), sqrt(2)); s = (m - 1) / (m + 1);
    log m = 2 s (1 + s^2/3 + s^4/5 + ... + s^20/21), by Horner; result = e * ln 2 + log m.
    """
    bits = np.asarray(x, np.float64).view(np.int64)
    e = (bits >> 52) - 1023
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64)
    big = m >= 1.4142135623730951
    m = np.where(big, m * 0.5, m)
    e = np.where(big, e + 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    p = np.full_like(s, 1.0 / 21.0)
    for divisor in (19, 17, 15, 13, 11, 9, 7, 5, 3, 1):
        p = p * s2 + 1.0 / divisor
    return e * 0.6931471805599453 + (2.0 * s) * p


def sincos_f64(x: F64) -> tuple[F64, F64]:
    """(sin x, cos x) of float64 [any shape] for |x| < 2**24; error below 1e-11 there.

    q = round_half_even(x * 2 / pi); r = x - q * pi/2 in three parts; Taylor polynomials by Horner
    (sin to r^15, cos to r^16); the quadrant is q mod 4.
    """
    x = np.asarray(x, np.float64)
    magic = 6755399441055744.0  # 1.5 * 2**52
    q = (x * 0.6366197723675814 + magic) - magic
    r = ((x - q * 1.5707963109016418) - q * 1.5893254712295857e-08) - q * 6.123233995736766e-17
    r2 = r * r
    s = np.full_like(r, -1.0 / 1307674368000.0)
    for coefficient in (1 / 6227020800, -1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6):
        s = s * r2 + coefficient
    s = r + (r * r2) * s
    c = np.full_like(r, 1.0 / 20922789888000.0)
    for divisor in (-87178291200, 479001600, -3628800, 40320, -720, 24, -2, 1):
        c = c * r2 + 1 / divisor
    quadrant = q.astype(np.int64) & 3
    sine = np.choose(quadrant, [s, c, -s, -c])
    cosine = np.choose(quadrant, [c, -s, -c, s])
    return sine, cosine


def philox4x32(
    counter: tuple[U32, U32, U32, U32], key: tuple[int, int]
) -> tuple[U32, U32, U32, U32]:
    """Philox4x32-10 (Salmon et al., SC 2011): four uint32 for each counter [same shapes]."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & np.uint64(0xFFFFFFFF),
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & np.uint64(0xFFFFFFFF),
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def gumbel_noise(seed: int, choice: int, position: int, token_ids: npt.NDArray[np.int32]) -> F64:
    """Standard Gumbel noise of each token id, float64 [n]: -log(-log u).

    u = (word + 0.5) / 2**32, word = lane id % 4 of Philox4x32-10 with counter
    (id // 4, position, choice, 0) and key (low, high word of the seed).
    """
    ids = np.asarray(token_ids, np.uint32)
    fixed = [np.full_like(ids, value, dtype=np.uint32) for value in (position, choice, 0)]
    words = philox4x32((ids >> np.uint32(2), *fixed), (seed & 0xFFFFFFFF, seed >> 32))  # type: ignore[arg-type]
    word = np.choose(ids & 3, words).astype(np.float64)
    return -log_f64(-log_f64((word + 0.5) * 2.0**-32))
