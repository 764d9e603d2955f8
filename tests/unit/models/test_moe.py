"""A row's mixture of experts does not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from coppice.kernels import get_ops
from coppice.models.config import ExpertSpec
from coppice.models.mlp import GatedMLP
from coppice.models.moe import ExpertMixture
from coppice.weights import Linear

HIDDEN, INNER = 24, 16


def mixture(count: int, top_k: int, renormalize: bool) -> ExpertMixture:
    generator = torch.Generator().manual_seed(3)
    ops = get_ops()

    def linear(rows: int, columns: int) -> Linear:
        weight = torch.randn(rows, columns, generator=generator)
        return Linear.from_tensor(ops, "test", weight)

    spec = ExpertSpec(count=count, top_k=top_k, intermediate_size=INNER, renormalize=renormalize)
    experts = [
        GatedMLP(linear(2 * INNER, HIDDEN), linear(HIDDEN, INNER), ops, "silu")
        for _ in range(count)
    ]
    return ExpertMixture(linear(count, HIDDEN), experts, spec)


@pytest.mark.parametrize(("count", "top_k"), [(1, 1), (4, 2), (7, 3), (64, 8), (128, 8)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_rows_stand_alone(count: int, top_k: int, renormalize: bool) -> None:
    moe = mixture(count, top_k, renormalize)
    x = torch.randn(37, HIDDEN)
    together = moe(x, x)
    for picked in ([5], [36], [0, 1, 2], list(range(36, -1, -1)), list(range(0, 37, 5))):
        assert torch.equal(moe(x[picked], x[picked]), together[picked])


def test_weights_sum_to_one_only_when_asked() -> None:
    x = torch.randn(5, HIDDEN) * 0.1
    share, chosen = mixture(6, 3, True).route(x)
    assert torch.allclose(share.sum(-1), torch.ones(5))
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert (mixture(6, 3, False).route(x)[0].sum(-1) < 0.99).all()
