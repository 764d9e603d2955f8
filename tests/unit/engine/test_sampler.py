"""Sampling: frequencies, kept sets, penalties, state, faults and independence of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coppice.engine.request import SamplingParams
from coppice.engine.sampler import SamplerState, sample
from coppice.kernels.sampling import RowParams
from coppice.kernels.sampling_reference import kept, masses, process

V = 257


def logits_of(num_rows: int, vocab: int = V, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, scale, (num_rows, vocab)).astype(np.float32))


def state(vocab: int = V, prompt=(), choice: int = 0, eos=(), **params) -> SamplerState:
    params.setdefault("seed", 1)
    return SamplerState(SamplingParams(**params), prompt, vocab, choice, eos)


def chi_square_limit(df: int, z: float = 4.75) -> float:
    """Upper quantile at p = 1e-6 (z = 4.75), by Wilson and Hilferty's cube root."""
    return df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "position", "choice"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_follow_the_softmax(vary, temperature):
    draws, k = 2500, 12
    row = logits_of(1, k, seed=3, scale=1.0)
    p = torch.softmax(row[0].double() / temperature, -1).numpy()
    base = state(k, temperature=temperature)
    if vary == "position":
        states, positions = [base] * draws, range(draws)
    elif vary == "seed":
        states = [state(k, temperature=temperature, seed=s) for s in range(draws)]
        positions = [17] * draws
    else:
        states = [state(k, temperature=temperature, choice=c) for c in range(draws)]
        positions = [17] * draws
    tokens = sample(row.expand(draws, k).contiguous(), states, list(positions)).tokens
    counts = np.bincount(tokens, minlength=k)
    assert chi_square(counts, p) < chi_square_limit(k - 1)
    biased = torch.softmax(row[0].double() / (temperature * 1.5), -1).numpy()
    assert chi_square(counts, biased) > chi_square_limit(k - 1)


def sorted_reference(y: np.ndarray, params: RowParams, top_p: float) -> set[int]:
    """Top-k, then top-p of the rest, then min-p, one token at a time in float64."""
    order = sorted(range(len(y)), key=lambda t: (-y[t], t))
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp(y[order].astype(np.float64))
    total, before, keep = p.sum(), 0.0, []
    for t, q in zip(order, p, strict=True):
        if keep and (before >= top_p * total or y[t] < np.float32(params.log_min_p)):
            break
        keep.append(t)
        before += q
    return set(keep)


@pytest.mark.parametrize("vocab", [5, 64, 257, 4096])
def test_kept_sets_equal_a_plain_sort(vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(100 if vocab < 4096 else 15):
        y = rng.normal(0, rng.choice([0.01, 1, 8]), vocab).astype(np.float32)
        if rng.random() < 0.3:
            y = np.round(y)  # many ties
        y -= y.max()
        params = RowParams(vocab_size=vocab)
        params.top_k = int(rng.choice([0, 1, 3, 40, vocab, 10 * vocab]))
        params.top_p = float(rng.choice([1.0, 0.999, 0.9, 0.5, 1e-6]))
        params.log_min_p = math.log(rng.choice([1e-30, 0.01, 0.1, 1.0]))
        got = set(kept(y, params).tolist())
        # A float32 exp may move a boundary that float64 puts within 1e-6 of top_p.
        assert got >= sorted_reference(y, params, params.top_p * (1 - 1e-6))
        assert got <= sorted_reference(y, params, params.top_p * (1 + 1e-6))


def test_ties_at_a_boundary_fall_to_the_lower_id():
    y = np.zeros(10, np.float32)
    params = RowParams(vocab_size=10)
    params.top_k = 3
    assert kept(y, params).tolist() == [0, 1, 2]
    params.top_k, params.top_p = 0, 0.35
    assert kept(y, params).tolist() == [0, 1, 2, 3]
    row = torch.zeros(1, 10)
    assert sample(row, [state(10, temperature=0.0)], [0]).tokens.tolist() == [0]


def test_masses_count_probabilities():
    y = np.array([0.0, -1.0, -30.0, -np.inf], np.float32)
    assert np.allclose(masses(y) / 2.0**44, np.exp(y.astype(np.float64)), rtol=2e-7, atol=1e-13)


def test_penalties_follow_the_formula():
    raw = logits_of(1, 16, seed=1)[0].numpy()
    s = state(
        16,
        prompt=[1, 2, 2],
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    for token in (2, 3, 3, 3):
        s.accept(token)
    expected = raw.astype(np.float64)
    for t in (1, 2, 3):
        expected[t] = expected[t] / 1.5 if expected[t] > 0 else expected[t] * 1.5
    expected[2] -= 0.25 + 0.5
    expected[3] -= 0.75 + 0.5
    assert np.allclose(process(raw, s.row, None), expected, atol=1e-6)


def test_presence_and_frequency_ignore_the_prompt():
    raw = logits_of(1, 16)[0].numpy()
    s = state(16, prompt=[1, 2, 3], presence_penalty=2.0, frequency_penalty=2.0)
    assert np.array_equal(process(raw, s.row, None), raw)


def test_rollback_and_fork_restore_penalties():
    raw = logits_of(1)[0].numpy()
    s = state(prompt=[5], repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=3, eos=[9])
    for token in (7, 7, 8):
        s.accept(token)
    want = process(raw, s.row, None)
    branch = s.fork()
    for token in range(100, 240):  # far past the first capacity
        branch.accept(token)
    assert np.array_equal(process(raw, s.row, None), want)
    assert not np.array_equal(process(raw, branch.row, None), want)
    branch.rollback(140)
    assert np.array_equal(process(raw, branch.row, None), want)
    branch.rollback(1)
    assert process(raw, branch.row, None)[9] == -np.inf
    with pytest.raises(ValueError, match="roll back"):
        branch.rollback(3)


def test_logit_bias_moves_the_choice():
    row = logits_of(1)
    best = int(row.argmax())
    banned = state(temperature=0.0, logit_bias={best: -100.0})
    forced = state(temperature=1.0, logit_bias={200: 100.0, 10**6: 100.0})
    assert sample(row, [banned], [0]).tokens[0] == int(row[0].topk(2).indices[1])
    assert sample(row, [forced], [0]).tokens[0] == 200


def test_min_tokens_bans_endings_until_enough_tokens():
    row = torch.zeros(1, 8)
    row[0, 3], row[0, 4], row[0, 5] = 9.0, 8.0, 7.0
    s = state(8, temperature=0.0, min_tokens=2, stop_token_ids=(4,), eos=(3,))
    assert sample(row, [s], [0]).tokens[0] == 5
    s.accept(5)
    s.accept(5)
    assert sample(row, [s], [2]).tokens[0] == 3
    ignoring = state(8, temperature=0.0, min_tokens=2, ignore_eos=True, eos=(3,))
    assert sample(row, [ignoring], [0]).tokens[0] == 3


def bitmask(allowed, vocab: int) -> np.ndarray:
    mask = np.zeros((vocab + 31) // 32, np.int32)
    for t in allowed:
        mask[t // 32] |= np.array(1 << (t % 32), np.uint32).astype(np.int32)
    return mask


def test_a_mask_allows_only_its_tokens_and_ends_despite_min_tokens():
    row = logits_of(1)
    allowed = [31, 32, 63, 64, 200]
    s = state(temperature=5.0)
    got = {int(sample(row, [s], [p], [bitmask(allowed, V)]).tokens[0]) for p in range(200)}
    assert got == set(allowed)
    only_eos = state(temperature=1.0, min_tokens=5, eos=(9,))
    assert sample(row, [only_eos], [0], [bitmask([9], V)]).tokens[0] == 9


def test_a_short_mask_bans_the_padding_and_vocab_size_bounds_all():
    row = torch.zeros(1, 100)
    row[0, 90] = 50.0
    assert sample(row, [state(100)], [0], [bitmask([3], 64)]).tokens[0] == 3
    assert sample(row, [state(80, temperature=0.0)], [0]).tokens[0] == 0


def test_logprobs_are_of_the_raw_logits():
    row = logits_of(2)
    expected = torch.log_softmax(row.double(), -1)
    s = state(temperature=0.3, top_k=2, logprobs=5, logit_bias={4: 50.0})
    out = sample(row, [s, state()], [0, 0])
    assert out.logprobs[1] is None
    entry = out.logprobs[0]
    assert entry.token == 4
    assert abs(entry.logprob - float(expected[0, 4])) < 1e-6
    want = expected[0].topk(5)
    assert [t for t, _ in entry.top] == want.indices.tolist()
    assert np.allclose([v for _, v in entry.top], want.values, atol=1e-6)
    chosen_only = sample(row, [state(logprobs=0)] * 2, [0, 0]).logprobs
    assert chosen_only[1].top == []
    assert sample(row, [state()] * 2, [0, 0]).logprobs is None


def mixed_states(n: int, vocab: int) -> list[SamplerState]:
    rng = np.random.default_rng(9)
    states = []
    for i in range(n):
        s = state(
            vocab,
            prompt=rng.integers(0, vocab, 20).tolist(),
            seed=i,
            temperature=float(rng.choice([0.0, 0.5, 1.0, 2.0])),
            top_k=int(rng.choice([0, 1, 5, 50])),
            top_p=float(rng.choice([1.0, 0.9, 0.3])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            presence_penalty=float(rng.choice([0.0, 0.7])),
            logprobs=[None, 0, 5, 20][i % 4],
        )
        for token in rng.integers(0, vocab, 10).tolist():
            s.accept(token)
        states.append(s)
    return states


def test_a_row_alone_equals_the_row_in_a_batch():
    n = 32
    row, states = logits_of(n), mixed_states(n, V)
    together = sample(row, states, list(range(n)))
    for i in range(n):
        alone = sample(row[i : i + 1].contiguous(), [states[i]], [i])
        assert alone.tokens[0] == together.tokens[i]
        assert (alone.logprobs or [None])[0] == together.logprobs[i]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damaged_row_fails_alone(bad, temperature):
    rows = logits_of(4)
    states = [state(seed=i, temperature=temperature, logprobs=2) for i in range(4)]
    before = sample(rows, states, [3] * 4)
    rows[1, 100] = bad
    rows[2] = -math.inf
    after = sample(rows, states, [3] * 4)
    assert after.faults.tolist() == [0, 1, 2, 0]
    assert after.tokens.tolist() == [before.tokens[0], -1, -1, before.tokens[3]]
    assert after.logprobs == [before.logprobs[0], None, None, before.logprobs[3]]


def test_minus_infinity_bans_a_token_without_failing_the_row():
    row = torch.full((1, V), -math.inf)
    row[0, 77] = -3.0
    assert sample(row, [state(logprobs=1)], [0]).tokens[0] == 77


def test_sampling_does_not_write_to_the_logits():
    row = logits_of(8)
    before = row.clone()
    sample(row, mixed_states(8, V), list(range(8)), [bitmask(range(0, V, 2), V)] * 8)
    assert torch.equal(row, before)


def test_tiny_temperatures_are_greedy():
    row = logits_of(1)
    assert sample(row, [state(temperature=1e-7)], [0]).tokens[0] == int(row.argmax())
    assert sample(row, [state(temperature=1e-4)], [0]).tokens[0] == int(row.argmax())
