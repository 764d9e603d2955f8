"""Quantized linear layers against float64, and bit for bit against the written-out formula."""

import pytest
import torch

from coppice.errors import EngineError
from coppice.kernels import get_ops
from coppice.kernels.formats import Format, Quantized
from tests.unit.kernels.exact import linear
from tests.unit.kernels.quantizing import INT4, INT8, pack, random_weight, rounded_rows

REFERENCE = get_ops(prefer="reference")


def by_name(fmt):
    return fmt.name + ("z" if fmt.zero_points else "")


@pytest.mark.parametrize("fmt", INT8 + INT4, ids=by_name)
def test_reference_matches_float64(fmt):
    weight, bias = random_weight(37, 256, fmt), torch.randn(37)
    x, residual = torch.randn(9, 256), torch.randn(9, 37)
    got = REFERENCE.linear(x, pack(REFERENCE, weight, fmt, bias), residual=residual)
    dense = weight.dequant()
    want = linear(rounded_rows(x, fmt.activation_group), dense, bias, residual)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    # Rounding activations costs less than half a code of 127 per product.
    size = x.abs().amax() / 254 * dense.abs().double().sum(1)
    assert ((got - linear(x, dense, bias, residual)).abs() <= size + 1e-4).all()


@pytest.mark.parametrize("fmt", INT8 + INT4, ids=by_name)
def test_reference_row_is_the_same_however_batched(fmt):
    packed = pack(REFERENCE, random_weight(50, 256, fmt), fmt)
    x = torch.randn(40, 256)
    whole = REFERENCE.linear(x, packed)
    for size in (1, 3, 16, 39):
        got = torch.cat([REFERENCE.linear(part, packed) for part in x.split(size)])
        assert torch.equal(got, whole), size


@pytest.mark.parametrize("fmt", [INT8[0], INT4[1]], ids=by_name)
def test_weight_only_multiplies_floats_with_the_dequantized_weight(fmt):
    floats = Format(name="w", bits=fmt.bits, group=fmt.group, zero_points=fmt.zero_points)
    weight = random_weight(20, 64, fmt)
    x = torch.randn(5, 64)
    got = REFERENCE.linear(x, pack(REFERENCE, weight, floats))
    want = REFERENCE.linear(x, REFERENCE.pack_linear(weight.dequant()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("fmt", [INT8[0], INT8[2], INT4[0], INT4[3]], ids=by_name)
def test_parts_unpack_to_what_was_packed(fmt):
    ops = REFERENCE
    weight = random_weight(40, 128, fmt)
    packed = ops.empty_linear(40, 128, fmt)
    for first, end in ((0, 7), (7, 32), (32, 40)):
        zeros = None if weight.zeros is None else weight.zeros[first:end]
        part = Quantized(weight.codes[first:end], weight.scales[first:end], zeros)
        ops.fill_linear(packed, first, part)
    assert torch.equal(ops.unpack_linear(packed), weight.dequant())
    token = torch.tensor([39, 0, 7, 7])
    assert torch.equal(ops.embedding(token, packed), weight.dequant()[token])


def test_scales_are_rounded_once_and_unpack_tells():
    fmt = INT4[0]
    weight = random_weight(16, 64, fmt)
    inexact = weight._replace(scales=weight.scales * 1.0003)
    stored = weight._replace(scales=inexact.scales.half().float())
    packed = pack(REFERENCE, inexact, fmt)
    assert torch.equal(REFERENCE.unpack_linear(packed), stored.dequant())
    x = torch.randn(3, 64)
    assert torch.equal(
        REFERENCE.linear(x, packed), REFERENCE.linear(x, pack(REFERENCE, stored, fmt))
    )


@pytest.mark.parametrize("fmt", [INT8[0], INT4[1]], ids=by_name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(fmt, poison):
    packed = pack(REFERENCE, random_weight(20, 128, fmt), fmt)
    x = torch.randn(3, 128)
    clean = REFERENCE.linear(x, packed)
    x[1, 100] = poison
    got = REFERENCE.linear(x, packed)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(EngineError, match="groups of 64"):
        REFERENCE.empty_linear(16, 100, INT4[2])
