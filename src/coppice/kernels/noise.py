"""The one random number: Gumbel noise as a function of (seed, position, token id).

Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) is
keyed by the 64-bit seed. Token ``t`` at position ``p`` takes word ``(t % 64) // 16`` of
the counter ``(16 * (t // 64) + t % 16, p mod 2^32, p >> 32, 0)``, so that 16, 8 or 4 lanes
of any vector machine produce neighbouring tokens. The top 31 bits ``k`` of the word give
the uniform ``U = (k + 1/2) / 2^31`` and the noise ``-log(-log U)``.

``log`` and ``exp`` are spelled out here as float32 multiplications and additions, each
rounded once, and again in ``native/sampler.cpp`` in the same order: the two agree bit for
bit on every instruction set, which no library's ``log`` promises.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]

GUMBEL_MAX = 22.1808
"""No noise exceeds this: ``-log(2^-32)``, rounded up."""
GUMBEL_MIN = -3.0993
"""No noise is below this: ``-log(-log(2^-32))``, rounded down."""

_f = np.float32
_MUL_A, _MUL_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_LN2_HI, _LN2_LO = _f(0.693359375), _f(-2.12194440e-4)
_LOG_POLY = tuple(
    _f(c)
    for c in (
        0.333333283662796,
        -0.25000298023223877,
        0.20001468062400818,
        -0.16642247140407562,
        0.14202174544334412,
        -0.12972238659858704,
        0.12712307274341583,
        -0.08101558685302734,
    )
)
_EXP_POLY = tuple(
    _f(c)
    for c in (
        0.5,
        0.16666576266288757,
        0.041666463017463684,
        0.008363235741853714,
        0.0013933733571320772,
    )
)
_SQRT_HALF_BITS = 0x3F3504F3
_UPPER_FROM = 0x5A82799A
"""``U >= sqrt(1/2)`` from here on: there ``log U`` is taken from ``1 - U``, kept exactly."""
EXP_FLOOR = _f(-64.0)


def philox(counter: tuple[U32, int, int, int], seed: int) -> tuple[U32, U32, U32, U32]:
    """Four words per counter; ``counter[0]`` is an array, the others are 32-bit scalars."""
    c0 = counter[0]
    c1, c2, c3 = (np.full_like(c0, c) for c in counter[1:])
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product_a = c0 * _MUL_A
        product_b = c2 * _MUL_B
        c0 = (product_b >> np.uint64(32)).astype(np.uint32) ^ c1 ^ np.uint32(k0)
        c2 = (product_a >> np.uint64(32)).astype(np.uint32) ^ c3 ^ np.uint32(k1)
        c1 = product_b.astype(np.uint32)
        c3 = product_a.astype(np.uint32)
        k0, k1 = (k0 + _WEYL_A) & 0xFFFFFFFF, (k1 + _WEYL_B) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(seed: int, position: int, num_tokens: int) -> U32:
    """The raw 32-bit word of tokens ``0 .. num_tokens - 1``, ``[num_tokens]``."""
    groups = -(-num_tokens // 64)
    counter = np.arange(16 * groups, dtype=np.uint32)
    four = philox((counter, position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF, 0), seed)
    in_order = np.stack([w.reshape(groups, 16) for w in four], axis=1)  # [groups, 4, 16]
    return in_order.reshape(-1)[:num_tokens]


def gumbel(seed: int, position: int, num_tokens: int) -> F32:
    """Standard Gumbel noise of tokens ``0 .. num_tokens - 1``, ``[num_tokens]`` float32.

    Args:
        seed: 64 bits.
        position: absolute position of the token to be chosen, below 2^64.
        num_tokens: vocabulary size; a token's noise does not depend on it.
    """
    return -log(exponential(words(seed, position, num_tokens)))


def exponential(word: U32) -> F32:
    """``-log U`` of the uniform a word stands for, with full precision near ``U = 1``."""
    k = (word >> np.uint32(1)).astype(np.int32)
    scale = _f(2.0**-31)
    u = (k.astype(np.float32) + _f(0.5)) * scale
    rest = ((np.int32(0x7FFFFFFF) - k).astype(np.float32) + _f(0.5)) * scale  # 1 - U
    exponent, f = _split(u)
    upper = k >= np.int32(_UPPER_FROM)
    exponent = np.where(upper, _f(0.0), exponent)
    f = np.where(upper, -rest, f)
    return -_log_of(exponent, f)


def log(x: F32) -> F32:
    """Natural logarithm of positive normal float32, within 2 ulp."""
    return _log_of(*_split(x))


def _split(x: F32) -> tuple[F32, F32]:
    """``x = 2^exponent * (1 + f)`` with ``1 + f`` in ``[sqrt(1/2), sqrt(2))``."""
    bits = x.view(np.int32)
    exponent = (bits - np.int32(_SQRT_HALF_BITS)) >> np.int32(23)
    mantissa = (bits - (exponent << np.int32(23))).view(np.float32)
    return exponent.astype(np.float32), mantissa - _f(1.0)


def _log_of(exponent: F32, f: F32) -> F32:
    p = np.full_like(f, _LOG_POLY[-1])
    for c in _LOG_POLY[-2::-1]:
        p = p * f + c
    square = f * f
    tail = (square * f) * p + exponent * _LN2_LO
    result: F32 = exponent * _LN2_HI + (f + (tail - _f(0.5) * square))
    return result


def exp(x: F32) -> F32:
    """``e^x`` for ``x <= 0``, within 2 ulp; below -64 it stays at ``e^-64``."""
    x = np.maximum(x, EXP_FLOOR)
    magic = _f(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
    n = (x * _f(1.44269504) + magic) - magic
    r = (x - n * _LN2_HI) - n * _LN2_LO
    p = np.full_like(r, _EXP_POLY[-1])
    for c in _EXP_POLY[-2::-1]:
        p = p * r + c
    y = (r * r) * p + r + _f(1.0)
    scaled: F32 = (y.view(np.int32) + (n.astype(np.int32) << np.int32(23))).view(np.float32)
    return scaled
