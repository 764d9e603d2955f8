"""GPTQ and AWQ on one matrix: what they promise is a smaller output error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Format, Quantized
from coppice.weights.awq import output_error, search_scales
from coppice.weights.gptq import GPTQ
from coppice.weights.names import integer_format
from coppice.weights.rounding import round_to_nearest

INT4 = [
    integer_format(4, group, zero_points=zeros, activations="float")
    for group in (32, 128)
    for zeros in (False, True)
]


def inputs(rows: int = 512, k: int = 128) -> Tensor:
    """Correlated rows with a few strong channels, as layers see them."""
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(k // 4, k, generator=random)
    x = torch.randn(rows, k // 4, generator=random) @ mix / 4
    x += 0.3 * torch.randn(rows, k, generator=random)
    x[:, ::17] *= 12
    return x


def weight(n: int = 48, k: int = 128) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 0.05


def error(x: Tensor, w: Tensor, rows: Quantized) -> float:
    return float((x @ (rows.dequant() - w).T).square().sum())


@pytest.mark.parametrize("fmt", INT4, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_has_a_quarter_less_output_error(fmt: Format, act_order: bool) -> None:
    x, w = inputs(), weight()
    found = GPTQ(act_order=act_order, block=48).quantize(w, x.T @ x, fmt)
    assert error(x, w, found) < 0.75 * error(x, w, round_to_nearest(w, fmt))


def test_blocks_of_columns_change_nothing_but_rounding() -> None:
    x, w = inputs(), weight()
    found = [GPTQ(block=block).quantize(w, x.T @ x, INT4[0]) for block in (1, 16, 128)]
    for other in found[1:]:
        assert (other.codes != found[0].codes).float().mean() < 0.01
        assert torch.equal(other.scales, found[0].scales)


def test_uncorrelated_inputs_leave_nothing_to_correct() -> None:
    w, fmt = weight(), INT4[0]
    found = GPTQ().quantize(w, torch.eye(128) * 3, fmt)
    assert torch.equal(found.codes, round_to_nearest(w, fmt).codes)


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x, w = inputs(), weight()
    x[:, 40] = 0
    found = GPTQ().quantize(w, x.T @ x, INT4[0])
    assert error(x, w, found) < 0.75 * error(x, w, round_to_nearest(w, INT4[0]))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_useless_statistics_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match=r"blk\.o.*calibrat"):
        GPTQ().quantize(weight(), torch.full((128, 128), value), INT4[0], name="blk.o")


def test_awq_protects_strong_inputs() -> None:
    x, w, fmt = inputs(), weight(), INT4[0]
    hessian = x.T @ x
    scales, power = search_scales([w], x.abs().mean(0), hessian, fmt)
    assert 0 < power < 1
    assert scales[::17].min() > scales[1::17].max()
    scaled = w * scales
    rounded = round_to_nearest(scaled, fmt, importance=hessian.diagonal() / scales.square())
    change = rounded.dequant() / scales - w
    assert output_error(change, hessian) < 0.8 * error(x, w, round_to_nearest(w, fmt))


def test_awq_leaves_equal_inputs_alone() -> None:
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(3))
    scales, power = search_scales([weight()], torch.ones(128), x.T @ x, INT4[0])
    assert power == 0 and torch.equal(scales, torch.ones(128))


def test_output_error_is_that_of_the_rows() -> None:
    x, change = inputs().double(), weight().double()
    direct = float((x @ change.T).square().sum())
    assert output_error(change, x.T @ x) == pytest.approx(direct, rel=1e-9)
