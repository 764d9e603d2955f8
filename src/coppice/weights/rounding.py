"""Codes and scales of a float weight, rounded to nearest.

A scale is chosen per group: at 8 bits so that the largest weight is code 127; at 4 bits by
trying a few clippings of the range and keeping the one with the least squared error, which
may be weighted by how much each input matters (the diagonal of a layer's Hessian).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Format, Quantized

_CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.81, 0.77, 0.73, 0.69, 0.65)
_ROWS = 1 << 21
"""Weights worked on at once, so that searching takes little memory beside the weight."""


def check_width(name: str, in_features: int, fmt: Format) -> None:
    """Refuse a group that does not divide a layer's width.

    Raises:
        CheckpointError: naming the layer and what to choose instead.
    """
    if fmt.group and in_features % fmt.group:
        raise CheckpointError(
            f"{name}: groups of {fmt.group} do not divide its {in_features} inputs; choose int8, "
            "which has one scale per output, or a group that divides them."
        )


def round_to_nearest(
    weight: Tensor,
    fmt: Format,
    *,
    name: str = "weight",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Quantize ``weight [n, K]`` to ``fmt``.

    Args:
        weight: any float dtype.
        fmt: a quantized format.
        name: the layer, for messages.
        importance: ``[K]`` non-negative weights of the squared error; all one if omitted.
        scale_dtype: scales are rounded to it before codes are chosen, for files that keep
            scales at less than float32.

    Raises:
        CheckpointError: the group does not divide ``K``, or a weight is not finite.
    """
    check_width(name, weight.shape[1], fmt)
    if not weight.shape[0]:
        raise CheckpointError(f"{name} has no output features; is the checkpoint complete?")
    step = max(1, _ROWS // weight.shape[1])
    parts = []
    for rows in torch.split(weight, step):
        scales, zeros = fit_scales(
            rows, fmt, name=name, importance=importance, scale_dtype=scale_dtype
        )
        parts.append(encode(rows, scales, zeros, fmt))
    return Quantized(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts if part.zeros is not None])
        if fmt.zero_points
        else None,
    )


def fit_scales(
    weight: Tensor,
    fmt: Format,
    *,
    name: str = "weight",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Scales ``[n, groups]`` float32, and zero points likewise where the format has them."""
    n, k = weight.shape
    groups = fmt.num_groups(k)
    w = weight.float().reshape(n, groups, k // groups)
    low, high = w.amin(-1), w.amax(-1)
    if not torch.isfinite(low + high).all():
        raise CheckpointError(f"{name} holds infinite or undefined weights; nothing can scale it.")
    types = (scale_dtype, fmt.scale_dtype)
    if fmt.bits == 8:  # noqa: PLR2004
        return _stored(torch.maximum(-low, high) / 127, types), None
    error = None if importance is None else importance.float().view(1, groups, -1)
    if fmt.zero_points:
        return _affine(w, low, high, error, types)
    return _symmetric(w, low, high, error, types), None


def encode(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format) -> Quantized:
    """The nearest codes of ``weight [n, K]`` under given scales (and zero points)."""
    n, k = weight.shape
    w = weight.float().reshape(n, scales.shape[1], -1)
    codes = torch.round(w / scales.unsqueeze(-1))
    if zeros is not None:
        codes = codes + zeros.unsqueeze(-1)
    codes = codes.clamp_(*code_range(fmt)).to(torch.int8).reshape(n, k)
    return Quantized(codes, scales, None if zeros is None else zeros.to(torch.int8))


def code_range(fmt: Format) -> tuple[int, int]:
    """Smallest and largest code."""
    if fmt.bits == 8:  # noqa: PLR2004
        return -127, 127
    return (0, 15) if fmt.zero_points else (-8, 7)


_Types = tuple[torch.dtype, torch.dtype]


def _stored(scales: Tensor, types: _Types) -> Tensor:
    """Scales as file and kernel will keep them; a group of zeros takes any scale but zero."""
    for dtype in types:
        limit = torch.finfo(dtype).max
        scales = scales.clamp(-limit, limit).to(dtype).float()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _symmetric(
    w: Tensor, low: Tensor, high: Tensor, importance: Tensor | None, types: _Types
) -> Tensor:
    """The best of several scales of either sign: codes reach further down than up (-8 to 7)."""
    far = torch.where(-low > high, low, high)  # the value furthest from zero, with its sign
    best = torch.full_like(far, torch.inf)
    scales = torch.ones_like(far)
    for clip in _CLIPS:
        for code in (-8.0, -7.5, 7.0):
            tried = _stored(far * (clip / code), types)
            step = tried.unsqueeze(-1)
            error = (torch.round(w / step).clamp_(-8, 7).mul_(step) - w).square_()
            found = (error if importance is None else error * importance).sum(-1)
            better = found < best
            best = torch.where(better, found, best)
            scales = torch.where(better, tried, scales)
    return scales


def _affine(
    w: Tensor, low: Tensor, high: Tensor, importance: Tensor | None, types: _Types
) -> tuple[Tensor, Tensor]:
    """The best of several clippings of ``[low, high]``, zero always among the values."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for clip in _CLIPS:
        tried = _stored((high - low) * (clip / 15), types)
        zero = torch.round(-low * clip / tried).clamp_(0, 15)
        step, offset = tried.unsqueeze(-1), zero.unsqueeze(-1)
        codes = (torch.round(w / step) + offset).clamp_(0, 15)
        error = ((codes - offset) * step - w).square_()
        found = (error if importance is None else error * importance).sum(-1)
        better = found < best
        best = torch.where(better, found, best)
        scales, zeros = torch.where(better, tried, scales), torch.where(better, zero, zeros)
    return scales, zeros
