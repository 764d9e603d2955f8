"""Quantized linear layers in plain PyTorch: the arithmetic of `formats`, written out.

The native kernels agree with this bit for bit: integer sums are exact, and every float
operation below is rounded on its own, in this order, on every machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coppice.errors import EngineError
from coppice.kernels.formats import Format, Quantized

CODE_MAX = 127.0
"""Largest activation code."""

TINY = 2.0**-119
"""Activations of a group below this are zero: the inverse of their scale would overflow."""


class QuantizedRows:
    """Rows in int8, one scale per row and group.

    Attributes:
        codes: ``[T, G, group]`` float32 whole numbers, -127 to 127; padded with zeros.
        scales: ``[T, G]`` float32; NaN where the group holds a NaN or an infinity.
    """

    __slots__ = ("codes", "scales")

    def __init__(self, x: Tensor, group: int) -> None:
        x = _grouped(x.float(), group)
        most = x.abs().amax(-1)  # [T, G]
        finite, used = torch.isfinite(most), most >= TINY
        limit = torch.full_like(most, CODE_MAX)  # a scalar would be divided by reciprocals
        inverse = torch.where(finite & used, limit / most, 0.0)
        codes = torch.where(finite.unsqueeze(-1), x, 0.0) * inverse.unsqueeze(-1)
        self.codes = torch.round(codes)  # to even, as the processor does
        scales = torch.where(used, most / limit, 0.0)
        self.scales = torch.where(finite, scales, torch.nan)


def empty(out_features: int, in_features: int, format: Format, device: torch.device) -> Quantized:
    """A zero weight of this shape.

    Raises:
        EngineError: groups do not divide the width.
    """
    check_groups(in_features, format)
    shape = (out_features, format.num_groups(in_features))
    return Quantized(
        torch.zeros(out_features, in_features, dtype=torch.int8, device=device),
        torch.zeros(shape, dtype=format.scale_dtype, device=device),
        torch.zeros(shape, dtype=torch.int8, device=device) if format.zero_points else None,
    )


def fill(held: Quantized, row: int, weight: Quantized) -> None:
    """Copy ``weight`` to rows ``row ..`` of ``held``, its scales rounded to the stored type."""
    end = row + weight.codes.shape[0]
    held.codes[row:end].copy_(weight.codes)
    held.scales[row:end].copy_(weight.scales)
    if held.zeros is not None:
        assert weight.zeros is not None, "the format has zero points"
        held.zeros[row:end].copy_(weight.zeros)


def check_groups(in_features: int, format: Format) -> None:
    """Refuse a width that groups do not divide."""
    if format.group and in_features % format.group:
        raise EngineError(
            f"Format {format.name} needs inputs in groups of {format.group}, "
            f"{in_features} are no multiple of that."
        )


def _grouped(values: Tensor, group: int) -> Tensor:
    """``[n, K]`` as ``[n, G, group]``, filled up with zeros."""
    padded = F.pad(values, (0, -values.shape[1] % group))
    return padded.view(values.shape[0], padded.shape[1] // group, group)


def linear(x: Tensor, weight: Quantized, format: Format) -> Tensor:
    """``x [T, K]`` quantized to int8, times ``weight [N, K]``: float32 ``[T, N]``."""
    group = format.activation_group
    rows = QuantizedRows(x, group)
    codes = _grouped(weight.codes.float(), group)
    if weight.zeros is not None:
        codes = codes - weight.zeros.float().unsqueeze(-1)
    scales = weight.scales.float()  # [N, G] or [N, 1]
    out = x.new_zeros(x.shape[0], weight.codes.shape[0], dtype=torch.float32)
    for g in range(codes.shape[1]):
        # Whole numbers below 2^24: exact in float32 whatever the order.
        sums = rows.codes[:, g] @ codes[:, g].T  # [T, N]
        scale = rows.scales[:, g, None]
        out = out + sums * (scale * scales[:, g] if format.group else scale)
    return out if format.group else out * scales[:, 0]
