"""A check at start: does an instruction set compute here what the portable code computes?

Kernels for a newer machine than their authors had are compiled from the same source, but
were never run there. A few small operators, compared with the portable path, take
milliseconds and turn a wrong answer into a slower right one.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coppice.kernels import _native
from coppice.kernels.formats import Activations, Format, Quantized
from coppice.kernels.native.ops import NativeOps
from coppice.kernels.pages import page_shape
from coppice.kernels.rows import Rows

TOLERANCE = 1e-3
"""Far above what fused and separate rounding differ by, far below any real mistake."""

_KINDS: tuple[tuple[Literal[8, 4], int, bool, Activations], ...] = (
    (8, 0, False, "int8"),
    (8, 32, False, "int8"),
    (4, 32, False, "int8"),
    (4, 128, True, "int8"),
    (8, 0, False, "float"),
    (4, 64, True, "float"),
)
"""Bits, group, zero points and activations of the quantized layers that are checked."""

_log = logging.getLogger(__name__)


def choose_isa() -> str:
    """Select the best instruction set that agrees with the portable one; its name."""
    candidates = _native.available()
    _native.set_isa(candidates[-1])
    expected = _answers()
    for name in candidates[:-1]:
        _native.set_isa(name)
        if agrees(_answers(), expected):
            return name
        _log.warning(
            "The %s kernels compute wrong results on this machine, using the next best; "
            "please report it.",
            name,
        )
    _native.set_isa(candidates[-1])
    return candidates[-1]


def agrees(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two runs of the check differ by rounding at most."""
    return all(
        torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(found, expected, strict=True)
    )


def _answers() -> list[Tensor]:
    """Small results of every operator, over row counts that take different tiles."""
    ops = NativeOps()
    noise = np.random.default_rng(1)

    def random(*shape: int) -> Tensor:
        return torch.from_numpy(noise.standard_normal(shape, np.float32))

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        packed = ops.pack_linear((random(72, 64) / 8).to(dtype), random(72))
        for num_rows in (1, 3, 8, 37):
            found.append(ops.linear(random(num_rows, 64), packed))
        heads, kv_heads, dim, num_rows, page = 4, 2, 32, 70, 16
        rows = Rows.chunk([1] * num_rows, [2, 0, 4, 1, 3])
        shape = page_shape(5, kv_heads, page, dim, dtype)
        k, v = (torch.zeros(shape, dtype=dtype) for _ in range(2))
        angles = random(num_rows, dim // 2)
        table = torch.stack([angles.cos(), angles.sin()], dim=1).contiguous()
        qkv = random(num_rows, (heads + 2 * kv_heads) * dim)
        q = ops.rope_append(qkv, rows, k, v, table, num_heads=heads)
        found += [q, ops.attention(q, rows, k, v, scale=0.2), k.float(), v.float()]
    found += _quantized_answers(ops, random(37, 128), noise)
    x = random(9, 96)
    found += [ops.rms_norm(x, random(96), eps=1e-6), ops.gated_activation(x, "silu")]
    return found


def _quantized_answers(ops: NativeOps, x: Tensor, noise: np.random.Generator) -> list[Tensor]:
    """Quantized layers of each kind on the first 1, 3, 8 and all rows of ``x [T, K]``."""
    found = []
    n, k = 40, x.shape[1]
    for bits, group, zero_points, activations in _KINDS:
        format = Format(
            name="check", bits=bits, group=group, zero_points=zero_points, activations=activations
        )
        low, high = (-127, 128) if bits == 8 else (0, 16) if zero_points else (-8, 8)  # noqa: PLR2004
        shape = (n, format.num_groups(k))
        codes = torch.from_numpy(noise.integers(low, high, (n, k), np.int8))
        scales = torch.from_numpy(noise.random(shape, np.float32)) / high / 8
        zeros = torch.from_numpy(noise.integers(0, 16, shape, np.int8))
        packed = ops.empty_linear(n, k, format)
        ops.fill_linear(packed, 0, Quantized(codes, scales, zeros if zero_points else None))
        found += [ops.linear(x[:rows], packed) for rows in (1, 3, 8, x.shape[0])]
    return found
