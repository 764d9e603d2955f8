"""GGML tensor types and their exact reading as float32.

Each type stores runs of elements as blocks of fixed size. The arithmetic and its order
follow the format's reference, so that every value is bit-equal to it. All work is
vectorised over blocks: ``[num_blocks, block_bytes]`` uint8 in, ``[num_blocks, block]``
float32 out.

Source: the ggml block formats (``Q8_0``, ``Q4_0`` and the K-quants of llama.cpp #1684).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quant:
    """One storage type: ``block`` elements in ``block_bytes`` bytes."""

    name: str
    block: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]


def _f32(raw: Bytes) -> Floats:
    return raw.view("<f4").astype(np.float32, copy=False)


def _f16(raw: Bytes) -> Floats:
    return raw.view("<f2").astype(np.float32)


def _bf16(raw: Bytes) -> Floats:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _split(raw: Bytes, *sizes: int) -> list[Bytes]:
    """Consecutive byte columns of every block."""
    edges = np.cumsum(sizes)[:-1]
    return [np.ascontiguousarray(part) for part in np.split(raw, edges, axis=1)]


def _nibbles(packed: Bytes) -> Bytes:
    """``[..., n]`` bytes to ``[..., 2, n]`` low and high halves."""
    return np.stack([packed & 0x0F, packed >> 4], axis=-2)


def _q8_0(raw: Bytes) -> Floats:
    scale, codes = _split(raw, 2, 32)
    return _f16(scale) * codes.view(np.int8).astype(np.float32)


def _q4_0(raw: Bytes) -> Floats:
    scale, packed = _split(raw, 2, 16)
    codes = _nibbles(packed).reshape(-1, 32).astype(np.int8) - np.int8(8)
    return _f16(scale) * codes.astype(np.float32)


def split_blocks(raw: Bytes, kind: str) -> tuple[Floats, NDArray[np.int8]]:
    """Scales ``[num_blocks]`` and codes ``[num_blocks, 32]`` of Q8_0 or Q4_0."""
    blocks = raw.reshape(-1, BY_NAME[kind].block_bytes)
    scale, packed = _split(blocks, 2, blocks.shape[1] - 2)
    if kind == "Q8_0":
        return _f16(scale).reshape(-1), packed.view(np.int8)
    codes = _nibbles(packed).reshape(-1, 32).astype(np.int8) - np.int8(8)
    return _f16(scale).reshape(-1), codes


def _q4_1(raw: Bytes) -> Floats:
    scale, minimum, packed = _split(raw, 2, 2, 16)
    return _f16(scale) * _nibbles(packed).reshape(-1, 32).astype(np.float32) + _f16(minimum)


def _fifth_bits(high: Bytes, packed: Bytes) -> Bytes:
    """Four bytes of top bits and sixteen of nibbles to 32 codes of 5 bits."""
    words = high.view("<u4")  # [num_blocks, 1]
    fifth = (words >> np.arange(32, dtype=np.uint32)).astype(np.uint8) & np.uint8(1)
    return _nibbles(packed).reshape(-1, 32) | (fifth << np.uint8(4))


def _q5_0(raw: Bytes) -> Floats:
    scale, high, packed = _split(raw, 2, 4, 16)
    codes = _fifth_bits(high, packed).astype(np.int8) - np.int8(16)
    return _f16(scale) * codes.astype(np.float32)


def _q5_1(raw: Bytes) -> Floats:
    scale, minimum, high, packed = _split(raw, 2, 2, 4, 16)
    return _f16(scale) * _fifth_bits(high, packed).astype(np.float32) + _f16(minimum)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Twelve bytes to eight 6-bit scales and eight 6-bit minima."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minima = np.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], axis=1)
    return scales, minima


def _k_affine(scale: Bytes, minimum: Bytes, packed: Bytes, codes: Bytes) -> Floats:
    """``d * scale * code - dmin * minimum`` for codes ``[num_blocks, 8, 32]``."""
    scales, minima = _k_scales(packed)
    steps = (_f16(scale) * scales.astype(np.float32))[:, :, None]
    shifts = (_f16(minimum) * minima.astype(np.float32))[:, :, None]
    return (steps * codes.astype(np.float32) - shifts).reshape(-1, 256)


def _q4_k(raw: Bytes) -> Floats:
    scale, minimum, packed, codes = _split(raw, 2, 2, 12, 128)
    return _k_affine(scale, minimum, packed, _nibbles(codes.reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(raw: Bytes) -> Floats:
    scale, minimum, packed, high, low = _split(raw, 2, 2, 12, 32, 128)
    codes = _nibbles(low.reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bits = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = (high[:, None, :] >> bits) & np.uint8(1)
    return _k_affine(scale, minimum, packed, codes | (fifth << np.uint8(4)))


def _q6_k(raw: Bytes) -> Floats:
    low, high, scales, scale = _split(raw, 128, 64, 16, 2)
    # Each half of 128 elements: 64 bytes of nibbles, 32 bytes of 2-bit tops.
    nibbles = _nibbles(low.reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    tops = (high.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    codes = (nibbles | (tops << 4)).astype(np.int8) - np.int8(32)
    steps = _f16(scale) * scales.view(np.int8).astype(np.float32)  # [num_blocks, 16]
    values = steps[:, :, None] * codes.reshape(-1, 16, 16).astype(np.float32)
    return values.reshape(-1, 256)


TYPES: dict[int, Quant] = {
    0: Quant("F32", 1, 4, _f32),
    1: Quant("F16", 1, 2, _f16),
    2: Quant("Q4_0", 32, 18, _q4_0),
    3: Quant("Q4_1", 32, 20, _q4_1),
    6: Quant("Q5_0", 32, 22, _q5_0),
    7: Quant("Q5_1", 32, 24, _q5_1),
    8: Quant("Q8_0", 32, 34, _q8_0),
    12: Quant("Q4_K", 256, 144, _q4_k),
    13: Quant("Q5_K", 256, 176, _q5_k),
    14: Quant("Q6_K", 256, 210, _q6_k),
    30: Quant("BF16", 1, 2, _bf16),
}
"""By the type code in the file."""

BY_NAME = {quant.name: quant for quant in TYPES.values()}


def dequantize(raw: Bytes, kind: str) -> Floats:
    """Stored bytes to float32, flat.

    Args:
        raw: whole blocks, ``[num_blocks * block_bytes]``.
        kind: a name in `BY_NAME`.
    """
    quant = BY_NAME[kind]
    with np.errstate(over="ignore", invalid="ignore"):  # a scale may be infinite or NaN
        return quant.decode(raw.reshape(-1, quant.block_bytes)).reshape(-1)
