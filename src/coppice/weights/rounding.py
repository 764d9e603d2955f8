"""Codes and scales of a float weight, rounded to nearest.

A scale is chosen per group: at 8 bits so that the largest weight is code 127; at 4 bits by
trying a few clippings of the range and keeping the one with the least squared error, which
may be weighted by how much each input matters (the diagonal of a layer's Hessian).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Format, Quantized

_SYMMETRIC = (
    *((-8, clip) for clip in (1.0, 0.92, 0.84, 0.75)),
    *((7, clip) for clip in (1.0, 0.9, 0.8, 0.7)),
)
"""The code a group's extreme weight is to have, and how much of its range is kept: codes reach
further down than up (-8 to 7), so a scale may have either sign."""
_AFFINE = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
_QUICK_SYMMETRIC, _QUICK_AFFINE = ((-8, 1.0), (-8, 0.85), (7, 0.92)), (1.0, 0.88)
_CHUNK = 1 << 18
"""Weights worked on at once: few enough to stay in a core's cache while scales are tried."""


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
    quick: bool = False,
) -> Quantized:
    """Quantize ``weight [n, K]`` to ``fmt``.

    Args:
        weight: any float dtype.
        fmt: a quantized format.
        name: the layer, for messages.
        importance: ``[K]`` non-negative weights of the squared error; all one if omitted.
        scale_dtype: scales are rounded to it before codes are chosen, for files that keep
            scales at less than float32.
        quick: try few scales, to compare weights rather than to keep the result.

    Raises:
        CheckpointError: the group does not divide ``K``, or a weight is not finite.
    """
    check_width(name, weight.shape[1], fmt)
    if not weight.shape[0]:
        raise CheckpointError(f"{name} has no output features; is the checkpoint complete?")
    scales, zeros = fit_scales(
        weight, fmt, name=name, importance=importance, scale_dtype=scale_dtype, quick=quick
    )
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for span in _spans(weight):
        points = None if zeros is None else zeros[span]
        codes[span] = encode(weight[span], scales[span], points, fmt).codes
    return Quantized(codes, scales, None if zeros is None else zeros.to(torch.int8))


def _spans(weight: Tensor) -> Iterator[slice]:
    """Runs of rows that together hold about `_CHUNK` weights."""
    step = max(1, _CHUNK // weight.shape[1])
    return (slice(first, first + step) for first in range(0, weight.shape[0], step))


def fit_scales(
    weight: Tensor,
    fmt: Format,
    *,
    name: str = "weight",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    quick: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scales ``[n, groups]`` float32, and zero points likewise where the format has them.

    See `round_to_nearest` for the arguments.
    """
    groups = fmt.num_groups(weight.shape[1])
    error = None if importance is None else importance.float().view(1, groups, -1)
    types = (scale_dtype, fmt.scale_dtype)
    scales, zeros = [], []
    for span in _spans(weight):
        w = weight[span].float()
        w = torch.unflatten(w, 1, (groups, -1))  # [n, groups, group]
        low, high = w.amin(-1), w.amax(-1)
        if not torch.isfinite(low + high).all():
            raise CheckpointError(
                f"{name} holds infinite or undefined weights; nothing can scale it."
            )
        if fmt.bits == 8:  # noqa: PLR2004
            scales.append(_stored(torch.maximum(-low, high) / 127, types))
        elif fmt.zero_points:
            tries = _QUICK_AFFINE if quick else _AFFINE
            found = _affine(w, low, high, error, types=types, tries=tries)
            scales.append(found[0])
            zeros.append(found[1])
        else:
            far = torch.where(-low > high, low, high)
            codes = _QUICK_SYMMETRIC if quick else _SYMMETRIC
            scales.append(_symmetric(w, far, error, types=types, tries=codes))
    return torch.cat(scales), torch.cat(zeros) if zeros else None


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
    w: Tensor,
    far: Tensor,
    importance: Tensor | None,
    *,
    types: _Types,
    tries: Sequence[tuple[int, float]],
) -> Tensor:
    """The best of several scales; ``far`` is each group's extreme weight, with its sign.

    Last comes the scale that fits the codes of the best one in the least squares sense.
    """
    best = torch.full_like(far, torch.inf)
    scales = torch.ones_like(far)
    for code, clip in (*tries, (0, 0.0)):
        if code:
            tried = _stored(far * (clip / code), types)
        else:
            codes = torch.round(w / scales.unsqueeze(-1)).clamp_(-8, 7)
            weighed = codes if importance is None else codes * importance
            tried = (w * weighed).sum(-1) / (codes * weighed).sum(-1).clamp_(min=1e-30)
            tried = _stored(torch.where(tried == 0, scales, tried), types)
        step = tried.unsqueeze(-1)
        error = torch.round(w / step).clamp_(-8, 7).mul_(step).sub_(w).square_()
        found = (error if importance is None else error.mul_(importance)).sum(-1)
        better = found < best
        best = torch.where(better, found, best)
        scales = torch.where(better, tried, scales)
    return scales


def _affine(
    w: Tensor,
    low: Tensor,
    high: Tensor,
    importance: Tensor | None,
    *,
    types: _Types,
    tries: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The best of several clippings of ``[low, high]``, zero always among the values."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for clip in tries:
        tried = _stored((high - low) * (clip / 15), types)
        zero = torch.round(-low * clip / tried).clamp_(0, 15)
        step, offset = tried.unsqueeze(-1), zero.unsqueeze(-1)
        codes = torch.round(w / step).add_(offset).clamp_(0, 15)
        error = codes.sub_(offset).mul_(step).sub_(w).square_()
        found = (error if importance is None else error.mul_(importance)).sum(-1)
        better = found < best
        best = torch.where(better, found, best)
        scales, zeros = torch.where(better, tried, scales), torch.where(better, zero, zeros)
    return scales, zeros
