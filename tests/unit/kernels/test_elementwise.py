"""Norms and gated activations against float64, and their batch invariance."""

import pytest
import torch

from coppice.kernels.interface import Activation
from tests.unit.kernels.exact import activation, rms_norm

KINDS = Activation.__args__


@pytest.mark.parametrize("n", [1, 8, 16, 24, 63, 64, 100, 896, 4096])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-20])
def test_rms_norm_matches_float64(native, n, scale):
    torch.manual_seed(n)
    x, weight = torch.randn(5, n) * scale, torch.randn(n)
    got = native.rms_norm(x, weight, eps=1e-6)
    torch.testing.assert_close(got.double(), rms_norm(x, weight, 1e-6), rtol=2e-6, atol=1e-30)


def test_rms_norm_of_constant_and_zero_rows(any_ops):
    x = torch.stack([torch.zeros(100), torch.full((100,), 5.0), torch.full((100,), 1e-42)])
    got = any_ops.rms_norm(x, torch.ones(100), eps=1e-6)
    torch.testing.assert_close(got.double(), rms_norm(x, torch.ones(100), 1e-6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_matches_float64(native, kind):
    spread = torch.cat([torch.linspace(-100, 100, 4001), torch.randn(2000), torch.randn(7) * 1e-40])
    up = torch.ones_like(spread)
    got = native.gated_activation(torch.stack([torch.cat([spread, up])]), kind)[0]
    want = activation(spread, kind)
    # Relative to the input where the function vanishes, to the result elsewhere.
    bound = 3e-7 * want.abs() + 2e-7 * spread.abs() * (spread < 0) + 1e-38
    assert ((got - want).abs() <= bound + 2e-6 * want.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 16, 30, 2049, 5000])
def test_activation_row_is_the_same_however_batched(native, kind, n):
    x = torch.randn(9, 2 * n)
    whole = native.gated_activation(x, kind)
    want = activation(x[:, :n], kind) * x[:, n:]
    torch.testing.assert_close(whole.double(), want, rtol=1e-5, atol=1e-6)
    for i in range(9):
        assert torch.equal(native.gated_activation(x[i : i + 1], kind)[0], whole[i])


def test_norm_row_is_the_same_however_batched(native):
    x, weight = torch.randn(200, 900), torch.randn(900)
    whole = native.rms_norm(x, weight, eps=1e-5)
    for i in range(0, 200, 13):
        assert torch.equal(native.rms_norm(x[i : i + 1], weight, eps=1e-5)[0], whole[i])


def test_norm_takes_leading_dims(any_ops):
    x, weight = torch.randn(4, 3, 24), torch.randn(24)
    got = any_ops.rms_norm(x, weight, eps=1e-6)
    torch.testing.assert_close(got.double(), rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row(native):
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    out = native.rms_norm(x, torch.ones(64), eps=1e-6)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()
    gated = native.gated_activation(x, "silu")
    assert gated[1, 5].isnan()
    assert gated.isnan().sum() == 1
