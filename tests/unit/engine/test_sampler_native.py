"""The native sampler equals the numpy one bit for bit, on every instruction set here."""

from __future__ import annotations

import numpy as np
import pytest

from coppice.engine.request import SamplingParams
from coppice.engine.sampler import SamplerState
from coppice.kernels import noise
from coppice.kernels.sampling import Choices, choose, native_module

NATIVE = native_module()
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the native extension is not built")


@pytest.fixture(params=NATIVE.available() if NATIVE else [])
def isa(request):
    before = NATIVE.isa()
    NATIVE.set_isa(request.param)
    yield request.param
    NATIVE.set_isa(before)


def equal(a: Choices, b: Choices) -> None:
    assert np.array_equal(a.faults, b.faults)
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.logprobs, b.logprobs)
    assert np.array_equal(a.top_ids, b.top_ids)
    assert np.array_equal(a.top_logprobs, b.top_logprobs)


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Rows of many shapes: flat, peaked, tied, far from zero, partly banned, damaged."""
    scale = rng.choice([1e-3, 0.3, 3.0, 12.0, 200.0], (rows, 1))
    logits = (rng.normal(0, 1, (rows, vocab)) * scale).astype(np.float32)
    for i in range(rows):
        row = logits[i]
        kind = rng.random()
        if kind < 0.2:
            row[:] = np.round(row)
        elif kind < 0.3:
            row[:] += np.float32(rng.choice([-1e4, 1e4]))
        elif kind < 0.4:
            row[rng.random(vocab) < 0.7] = -np.inf
        elif kind < 0.45:
            row[rng.integers(vocab)] = rng.choice([np.nan, np.inf, -np.inf])
        elif kind < 0.48:
            row[:] = rng.choice([0.0, -0.0, -np.inf, np.nan])
        elif kind < 0.55:
            row[rng.integers(vocab)] += 30
        elif kind < 0.6:
            row[rng.random(vocab) < 0.5] *= np.float32(0.0)  # both zeros
    return logits


def random_states(rng: np.random.Generator, rows: int, vocab: int) -> list[SamplerState]:
    states = []
    for _ in range(rows):
        on = rng.random(8) < 0.35
        params = SamplingParams(
            seed=int(rng.integers(0, 2**63)),
            temperature=float(rng.choice([0.0, 1e-5, 0.3, 1.0, 1.0, 2.5, 100.0])),
            top_k=int(rng.choice([1, 2, 20, 50, 500, vocab - 1, vocab + 7])) if on[0] else 0,
            top_p=float(rng.choice([1e-9, 0.1, 0.9, 0.95, 0.999, 1 - 1e-12])) if on[1] else 1.0,
            min_p=float(rng.choice([1e-20, 0.01, 0.2, 1.0])) if on[2] else 0.0,
            repetition_penalty=float(rng.choice([0.5, 1.1, 1.3])) if on[3] else 1.0,
            presence_penalty=float(rng.choice([-1, 0.5])) if on[4] else 0.0,
            frequency_penalty=float(rng.choice([-0.3, 0.7])) if on[4] else 0.0,
            logit_bias={int(t): float(rng.normal() * 5) for t in rng.integers(0, vocab, 30)}
            if on[5]
            else {},
            min_tokens=100 if on[6] else 0,
            stop_token_ids=tuple(int(t) for t in rng.integers(0, vocab, 4)),
            logprobs=int(rng.choice([0, 1, 5, 20])) if on[7] else None,
        )
        prompt = rng.integers(0, vocab + 5, 40).tolist()
        size = int(rng.choice([vocab, vocab, vocab + 100, max(1, vocab - 3)]))
        state = SamplerState(params, prompt, size, int(rng.integers(3)), [0, 1])
        for token in rng.integers(0, vocab, 80).tolist():
            state.accept(token)
        states.append(state)
    return states


def random_masks(rng: np.random.Generator, rows: int, vocab: int):
    if rng.random() < 0.5:
        return None
    masks = []
    for _ in range(rows):
        kind = rng.random()
        words = (vocab + 31) // 32 - int(rng.random() < 0.2)
        if kind < 0.5:
            masks.append(None)
        elif kind < 0.6:
            masks.append(np.zeros(words, np.int32))
        else:
            bits = rng.random(32 * words) < rng.choice([0.01, 0.5, 0.99])
            bits[32 * (words // 2) :] |= kind > 0.9
            masks.append(np.packbits(bits, bitorder="little").view(np.int32))
    return masks


@pytest.mark.parametrize(
    ("vocab", "rows", "rounds"),
    [(1, 20, 3), (5, 100, 4), (63, 100, 5), (257, 200, 5), (4096, 100, 4), (32000, 30, 2)],
)
def test_native_equals_reference(isa, vocab, rows, rounds):
    rng = np.random.default_rng(vocab)
    faults = np.zeros(3, int)
    for _ in range(rounds):
        logits, states = random_logits(rng, rows, vocab), random_states(rng, rows, vocab)
        params = [s.row for s in states]
        positions = rng.integers(0, 2**40, rows)
        masks = random_masks(rng, rows, vocab)
        native = choose(logits, params, positions, masks, backend="native")
        equal(native, choose(logits, params, positions, masks, backend="reference"))
        faults += np.bincount(native.faults, minlength=3)
    assert faults[0] > 0
    assert vocab < 257 or (faults > 0).all()


def test_noise_is_equal_bit_for_bit(isa):
    for seed, position, n in [(0, 0, 1), (2**64 - 1, 2**63, 1000), (12345, 7, 70_000)]:
        out = np.zeros(n, np.float32)
        NATIVE.gumbel(seed, position, n, out.ctypes.data)
        assert np.array_equal(out.view(np.int32), noise.gumbel(seed, position, n).view(np.int32))


def test_dropping_tokens_that_cannot_win_never_changes_the_winner(isa):
    """The native draw skips noise it can bound; the reference never does."""
    rng = np.random.default_rng(1)
    vocab = 2000
    for scale in (0.0, 0.5, 4.0, 15.0):
        row = (rng.normal(0, 1, vocab) * scale).astype(np.float32)
        rows = np.repeat(row[None], 200, axis=0)
        state = SamplerState(SamplingParams(seed=int(scale * 8)), [], vocab)
        positions = np.arange(200)
        params = [state.row] * 200
        equal(
            choose(rows, params, positions, backend="native"),
            choose(rows, params, positions, backend="reference"),
        )


def test_rows_do_not_depend_on_threads_or_neighbours(isa):
    rng = np.random.default_rng(3)
    rows, vocab = 64, 4096
    logits, states = random_logits(rng, rows, vocab), random_states(rng, rows, vocab)
    params, positions = [s.row for s in states], np.arange(rows)
    together = choose(logits, params, positions, backend="native")
    before = NATIVE.num_threads()
    try:
        NATIVE.set_num_threads(2)
        equal(choose(logits, params, positions, backend="native"), together)
    finally:
        NATIVE.set_num_threads(before)
    for i in rng.permutation(rows):
        alone = choose(logits[i : i + 1], [params[i]], positions[i : i + 1], backend="native")
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_wrong_arrays_are_refused():
    state = SamplerState(SamplingParams(), [], 10)
    good = np.zeros((1, 10), np.float32)
    with pytest.raises(ValueError, match="float32"):
        choose(good.astype(np.float64), [state.row], np.zeros(1, np.int64), backend="native")
    with pytest.raises(ValueError, match="one entry per row"):
        choose(good, [state.row] * 2, np.zeros(2, np.int64), backend="native")
