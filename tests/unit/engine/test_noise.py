"""The random number: known answers, range, independence and the shape of its distribution."""

from __future__ import annotations

import numpy as np
import pytest

from coppice.engine.noise import choice_seed
from coppice.kernels import noise

KNOWN = [  # Random123's kat_vectors for philox4x32-10
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = noise.philox((np.array([counter[0]], np.uint32), *counter[1:]), key)
    assert tuple(int(w[0]) for w in words) == expected


def test_noise_of_a_token_does_not_depend_on_the_vocabulary():
    whole = noise.gumbel(7, 11, 5000)
    for n in (1, 15, 64, 65, 4096):
        assert np.array_equal(noise.gumbel(7, 11, n), whole[:n])


def test_noise_differs_by_seed_position_and_token():
    values = {
        noise.words(seed, position, 200)[token]
        for seed in (0, 1, 2**32, 2**63)
        for position in (0, 1, 2**32, 2**40 + 1)
        for token in range(200)
    }
    assert len(values) > 0.999 * 4 * 4 * 200


def test_bounds_hold_at_the_extreme_words():
    g = -noise.log(noise.exponential(np.array([0, 1, 2**32 - 1], np.uint32)))
    assert noise.GUMBEL_MIN <= g[0] < -3.0
    assert 22.0 < g[2] <= noise.GUMBEL_MAX


def test_log_and_exp_against_float64():
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-22, 4, 100_000)).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    assert np.max(np.abs(noise.log(x) - exact) / np.maximum(np.abs(exact), 1e-3)) < 3e-7
    y = rng.uniform(-64, 0, 100_000).astype(np.float32)
    assert np.max(np.abs(noise.exp(y) / np.exp(y.astype(np.float64)) - 1)) < 2e-7
    assert noise.exp(np.zeros(1, np.float32))[0] == 1.0


def test_gumbel_is_gumbel():
    """Kolmogorov-Smirnov at p = 1e-6 over a million values; a shifted copy must fail."""
    n = 1 << 20
    g = np.sort(noise.gumbel(123, 456, n).astype(np.float64))

    def distance(values):
        cdf = np.exp(-np.exp(-values))
        return np.max(np.abs(cdf - (np.arange(n) + 0.5) / n))

    limit = np.sqrt(-0.5 * np.log(0.5e-6) / n)
    assert distance(g) < limit
    assert distance(g + 0.01) > limit


def test_neighbouring_tokens_positions_and_seeds_are_uncorrelated():
    n = 1 << 16
    g = noise.gumbel(5, 100, n).astype(np.float64)
    for other in (
        np.roll(g, 1),
        np.roll(g, 16),
        noise.gumbel(5, 101, n),
        noise.gumbel(6, 100, n),
        noise.gumbel(choice_seed(5, 1), 100, n),
    ):
        assert abs(np.corrcoef(g, other)[0, 1]) < 5 / np.sqrt(n)


def test_choices_have_their_own_seed_and_the_first_keeps_the_requests():
    assert choice_seed(42, 0) == 42
    assert choice_seed(-1, 0) == 2**64 - 1
    seeds = {choice_seed(s, i) for s in range(100) for i in range(16)}
    assert len(seeds) == 1600
