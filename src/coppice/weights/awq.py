"""Input scales that protect the weights of strong inputs, found by measured output error.

Multiplying an input channel's weights by ``s`` and dividing the input by ``s`` changes
nothing, but moves the rounding error of the channel down by about ``s``. The scales tried
are powers ``|x|^a`` of the mean input magnitude; the one kept is the one whose rounded
weight gives the least output error on the calibration text. Who made the input absorbs the
division: a norm's weight, or the rows of the linear layer before.

Source: Lin et al., AWQ (MLSys 2024; arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coppice.kernels.formats import Format
from coppice.weights.rounding import round_to_nearest

POINTS = 20
"""Powers tried between 0 and 1."""


def output_error(change: Tensor, hessian: Tensor) -> float:
    """``|X change^T|^2`` for ``change [n, K]`` and ``hessian = X^T X [K, K]``."""
    return float((change @ hessian).mul_(change).sum(dtype=torch.float64))


def search_scales(
    weights: Sequence[Tensor], magnitude: Tensor, hessian: Tensor, fmt: Format
) -> tuple[Tensor, float]:
    """Scales ``[K]`` for layers that share an input, and the power they come from.

    Args:
        weights: ``[n, K]`` each.
        magnitude: ``[K]`` mean absolute input over the calibration text.
        hessian: ``[K, K]``, the sum of ``x x^T`` over it.
        fmt: what the weights will be rounded to.

    Returns:
        ``s``: multiply the weights' columns by it and divide the input by it. All one, with
        power 0, where no power tried does better.

    Cost: ``POINTS`` roundings and products ``[n, K] x [K, K]`` per weight.
    """
    best, power = torch.ones_like(magnitude), 0.0
    least = _error(weights, best, hessian, fmt)
    for point in range(1, POINTS):
        tried = _scales(magnitude, point / POINTS)
        found = _error(weights, tried, hessian, fmt)
        if found < least:
            best, power, least = tried, point / POINTS, found
    return best, power


def _scales(magnitude: Tensor, power: float) -> Tensor:
    """``magnitude^power``, scaled so that the largest and smallest are reciprocal."""
    raw = magnitude.float().clamp(min=1e-4 * float(magnitude.max().clamp(min=1e-20))).pow(power)
    return raw / (raw.max() * raw.min()).sqrt()


def _error(weights: Sequence[Tensor], scales: Tensor, hessian: Tensor, fmt: Format) -> float:
    importance = hessian.diagonal() / scales.square()
    total = 0.0
    for weight in weights:
        scaled = weight.float() * scales
        rounded = round_to_nearest(scaled, fmt, importance=importance, quick=True).dequant()
        total += output_error((rounded - scaled) / scales, hessian)
    return total
