"""The sampler in numpy: one row at a time, by sorting; what the native one is tested against.

Probabilities are counted as integers: a token of relative probability ``e`` has the mass
``round(e * 2^44)``. Integer sums do not depend on their order, so top-p and log-softmax
come out the same however a row is split over lanes.
"""

from __future__ import annotations

import math

import numpy as np

from coppice.kernels import noise
from coppice.kernels.sampling import (
    F32,
    I64,
    NOT_FINITE,
    NOTHING_ALLOWED,
    Choices,
    Mask,
    RowParams,
)

MASS_BITS = 44
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


def choose_row(
    raw: F32, params: RowParams, position: int, mask: Mask | None, *, out: Choices, i: int
) -> None:
    """Fill row ``i`` of ``out`` from ``raw [V]``; see `coppice.kernels.sampling.STEPS`."""
    if not bool(np.all(raw < np.inf)):
        out.faults[i] = NOT_FINITE
        return
    x = process(raw, params, mask)
    top = int(np.argmax(x)) if len(x) else 0
    if not len(x) or x[top] == -np.inf:
        out.faults[i] = NOTHING_ALLOWED
        return
    token = top
    if params.inv_temperature > 0.0:
        y = (x - x[top]) * np.float32(params.inv_temperature)
        score = y + noise.gumbel(params.seed, position, len(y))
        keep = kept(y, params)
        token = int(keep[np.argmax(score[keep])])
    out.tokens[i] = token
    if params.num_top >= 0:
        _logprobs(raw, params.num_top, out, i)


def process(raw: F32, params: RowParams, mask: Mask | None) -> F32:
    """Apply ``logit_bias`` to ``grammar_mask``: processed logits ``[min(V, vocab_size)]``."""
    x = raw[: params.vocab_size].copy()
    n = len(x)
    inside = params.bias_ids < n
    x[params.bias_ids[inside]] += params.bias_values[inside]
    _penalties(x, params)
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:n].astype(bool)
        x[: len(bits)][~bits] = -np.inf
        x[len(bits) :] = -np.inf
    if params.num_banned:
        banned = x.copy()
        ids = params.banned_ids[: params.num_banned]
        banned[ids[ids < n]] = -np.inf
        if np.any(banned > -np.inf):
            return banned
    return x


def _penalties(x: F32, params: RowParams) -> None:
    seen = slice(0, params.num_seen)
    ids = params.seen_ids[seen]
    inside = ids < len(x)
    ids = ids[inside]
    count = params.seen_counts[seen][inside]
    in_prompt = params.seen_prompt[seen][inside] != 0
    values = x[ids]
    repetition = np.float32(params.repetition)
    if params.repetition != 1.0:
        scaled = np.where(values > 0, values / repetition, values * repetition)
        values = np.where((count > 0) | in_prompt, scaled, values)
    values = values - np.float32(params.frequency) * count.astype(np.float32)
    x[ids] = np.where(count > 0, values - np.float32(params.presence), values)


def kept(y: F32, params: RowParams) -> I64:
    """Ids that survive top_k, top_p and min_p, ascending; never empty."""
    if params.top_k <= 0 and params.top_p >= 1.0 and params.log_min_p == -np.inf:
        return np.flatnonzero(y > -np.inf)
    order = np.argsort(-y, kind="stable")
    order = order[y[order] > -np.inf]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        mass = masses(y[order])
        before = np.cumsum(mass) - mass
        target = int(params.top_p * float(int(mass.sum())))
        order = order[: max(1, int(np.searchsorted(before, target, side="left")))]
    if params.log_min_p > -np.inf:
        order = order[: max(1, int(np.sum(y[order] >= np.float32(params.log_min_p))))]
    return np.sort(order)


def masses(y: F32) -> I64:
    """Integer masses ``round(2^44 e^y)`` of ``y <= 0``, ``[n]`` int64."""
    scaled: I64 = np.rint(noise.exp(y).astype(np.float64) * 2.0**MASS_BITS).astype(np.int64)
    return scaled


def log_sum_exp(raw: F32) -> tuple[float, float]:
    """``(max, ln sum exp(raw - max))`` of a row with at least one finite logit."""
    top = raw.max()
    total = int(masses(raw - top).sum())
    return float(top), _log(float(total)) - MASS_BITS * _LN2


def _logprobs(raw: F32, num_top: int, out: Choices, i: int) -> None:
    top, log_z = log_sum_exp(raw)
    out.logprobs[i] = (float(raw[out.tokens[i]]) - top) - log_z
    best = np.argsort(-raw, kind="stable")[:num_top]
    best = best[raw[best] > -np.inf]
    out.top_ids[i, : len(best)] = best
    out.top_logprobs[i, : len(best)] = (raw[best].astype(np.float64) - top) - log_z


def _log(x: float) -> float:
    """``ln x`` in float64 with a fixed order of operations, equal to the native one."""
    mantissa, exponent = math.frexp(x)
    if mantissa < _SQRT_HALF:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square, p = z * z, 0.0
    for k in range(23, 0, -2):
        p = p * square + 1.0 / k
    return exponent * _LN2 + 2.0 * z * p
