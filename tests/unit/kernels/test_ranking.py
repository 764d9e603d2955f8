"""Ranking under noise: native against numpy, and against the draw itself."""

from __future__ import annotations

import numpy as np
import pytest

from coppice.kernels.ranking import distribution, rank
from coppice.kernels.sampling import RowParams, choose, native_module

CUTS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"log_min_p": -2.0}]


def params(cuts: dict[str, float], temperature: float, vocab_size: int, seed: int) -> RowParams:
    row = RowParams(vocab_size=vocab_size)
    row.seed = seed
    row.inv_temperature = 1.0 / temperature if temperature else 0.0
    for name, value in cuts.items():
        setattr(row, name, value)
    row.publish()
    return row


@pytest.mark.skipif(native_module() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_native_ranks_as_numpy_does(cuts: dict[str, float], temperature: float) -> None:
    rng = np.random.default_rng(3)
    logits = (4 * rng.standard_normal((6, 1037))).astype(np.float32)
    rows = [params(cuts, temperature, 1000, seed=i) for i in range(6)]
    positions = list(range(50, 56))
    tokens, shares = rank(logits, rows, positions, 12, sharpness=1.7, backend="native")
    wanted, theirs = rank(logits, rows, positions, 12, sharpness=1.7, backend="reference")
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_allclose(shares, theirs, atol=2e-4)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_the_first_is_what_a_draw_gives(cuts: dict[str, float], temperature: float) -> None:
    rng = np.random.default_rng(4)
    logits = (3 * rng.standard_normal((32, 500))).astype(np.float32)
    rows = [params(cuts, temperature, 480, seed=9) for _ in range(32)]
    drawn = choose(logits, rows, list(range(32))).tokens
    np.testing.assert_array_equal(rank(logits, rows, list(range(32)), 4)[0][:, 0], drawn)


def test_rows_without_a_choice_rank_nothing() -> None:
    logits = np.full((2, 100), -np.inf, np.float32)
    logits[1, 3] = np.nan
    tokens, _ = rank(logits, [params({}, 1.0, 100, 1)] * 2, [1, 2], 3)
    assert (tokens == -1).all()


@pytest.mark.parametrize("cuts", CUTS)
def test_draws_follow_the_distribution(cuts: dict[str, float]) -> None:
    logits = (2 * np.random.default_rng(5).standard_normal((1, 40))).astype(np.float32)
    row = params(cuts, 0.9, 40, seed=2)
    expected = distribution(logits[0], row)
    assert expected.sum() == pytest.approx(1.0)
    count = 4000
    drawn = choose(np.repeat(logits, count, 0), [row] * count, list(range(count))).tokens
    seen = np.bincount(drawn, minlength=40)
    assert (seen[expected == 0] == 0).all()
    some = expected > 0
    error = seen[some] - count * expected[some]
    assert (error**2 / (count * expected[some])).sum() < 2.2 * some.sum() + 12
