"""The likeliest next tokens under a request's own noise: what a token tree's siblings are.

A draw is the largest of ``y + noise`` (see `coppice.kernels.sampling`). The first few by that
sum are what another model, drawing with the same noise, most likely draws (Gumbel top-k,
Kool et al., ICML 2019: a sample without replacement, in order). At temperature 0 they are the
largest logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from coppice.kernels import noise
from coppice.kernels.sampling import F32, F64, I32, I64, Mask, RowParams, native_module
from coppice.kernels.sampling_reference import kept, process


def rank(
    logits: F32,
    params: Sequence[RowParams],
    positions: Sequence[int] | I64,
    width: int,
    *,
    sharpness: float = 1.0,
    backend: Literal["native", "reference"] | None = None,
) -> tuple[I32, F32]:
    """The first ``width`` tokens of each row, best first.

    Args:
        logits: ``[W, V]`` float32, C-contiguous, read only.
        params: of each row's sequence; no mask is known here.
        positions: ``[W]`` absolute position of the token that would be chosen.
        width: how many.
        sharpness: multiplies the sums before shares are taken of them.
        backend: force one implementation; by default native where it was built.

    Returns:
        Tokens ``[W, width]``, -1 where there are no more, and the logarithms of their shares
        in the sum of ``e^(sharpness * (y + noise))`` over what sampling keeps: how likely a
        model draws each whose logits differ a little, the less the greater ``sharpness``.
    """
    num_rows, vocab = logits.shape
    tokens = np.full((num_rows, width), -1, np.int32)
    shares = np.full((num_rows, width), -np.inf, np.float32)
    native = None if backend == "reference" else native_module()
    if native is None:
        for i in range(num_rows):
            scores = _scores(logits[i], params[i], int(positions[i])) * np.float32(sharpness)
            _rank_row(scores, tokens[i], shares[i])
        return tokens, shares
    if not (logits.flags.c_contiguous and logits.dtype == np.float32):
        raise ValueError("logits must be contiguous float32")
    addresses = np.array([p.address for p in params], np.uint64)
    at = np.asarray(positions, np.int64)
    if not len(addresses) == len(at) == num_rows:
        raise ValueError("params and positions need one entry per row")
    arrays = (logits, addresses, at, tokens, shares)
    native.rank(*(a.ctypes.data for a in arrays), sharpness, num_rows, vocab, width)
    return tokens, shares


def gumbel(seed: int, position: int, num_tokens: int) -> F32:
    """`coppice.kernels.noise.gumbel`, native where it was built."""
    native = native_module()
    if native is None:
        return noise.gumbel(seed, position, num_tokens)
    out: F32 = np.empty(num_tokens, np.float32)
    native.gumbel(seed, position, num_tokens, out.ctypes.data)
    return out


def distribution(logits: F32, params: RowParams, allowed: Mask | None = None) -> F64:
    """What a row is sampled from, after every step: probabilities ``[vocab_size]`` float64.

    Args:
        logits: ``[V]`` of the model.
        params: with a temperature above 0.
        allowed: a grammar's mask, see `coppice.kernels.sampling.Mask`.
    """
    x = process(logits, params, allowed)
    y = (x - x.max()) * np.float32(params.inv_temperature)
    probabilities: F64 = np.zeros(len(y))
    keep = kept(y, params)
    probabilities[keep] = np.exp(y[keep].astype(np.float64))
    probabilities /= probabilities.sum()
    return probabilities


def _scores(raw: F32, params: RowParams, position: int) -> F32:
    """What the argmax of a draw is taken over; empty where there is nothing to draw."""
    nothing: F32 = np.zeros(0, np.float32)
    if not bool(np.all(raw < np.inf)):
        return nothing
    x = process(raw, params, None)
    if not len(x) or x.max() == -np.inf:
        return nothing
    if params.inv_temperature == 0.0:
        return x
    y = (x - x.max()) * np.float32(params.inv_temperature)
    keep = kept(y, params)
    scores: F32 = np.full(len(y), -np.inf, np.float32)
    scores[keep] = y[keep] + noise.gumbel(params.seed, position, len(y))[keep]
    return scores


def _rank_row(scores: F32, tokens: I32, shares: F32) -> None:
    """Fill one row of `rank`."""
    order = np.argsort(-scores, kind="stable")[: len(tokens)]
    order = order[scores[order] > -np.inf]
    if not len(order):
        return
    best = float(scores[order[0]])
    total = float(np.log(np.exp(scores.astype(np.float64) - best).sum()))
    tokens[: len(order)] = order
    shares[: len(order)] = scores[order] - best - total
