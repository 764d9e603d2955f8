"""Quantized linear layers against float64, and bit for bit against the written-out formula."""

import pytest
import torch

from coppice import kernels
from coppice.errors import EngineError
from coppice.kernels import get_ops
from coppice.kernels.formats import F32, Format, Quantized
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
def test_weight_only_multiplies_floats_with_the_dequantized_weight(any_ops, fmt):
    floats = Format(name="w", bits=fmt.bits, group=fmt.group, zero_points=fmt.zero_points)
    weight = random_weight(20, 64, fmt)
    x = torch.randn(5, 64)
    got = any_ops.linear(x, pack(any_ops, weight, floats))
    want = any_ops.linear(x, any_ops.pack_linear(weight.dequant()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("fmt", [INT8[0], INT8[1], INT4[1], INT4[4]], ids=by_name)
def test_weight_only_bits_are_the_same_as_the_float_layers(native, fmt):
    floats = Format(name="w", bits=fmt.bits, group=fmt.group, zero_points=fmt.zero_points)
    for n, k in SHAPES.get(fmt.group, GROUPED):
        weight, bias = random_weight(n, k, fmt), torch.randn(n)
        packed = pack(native, weight, floats, bias)
        dense = native.pack_linear(weight.dequant(), bias)
        for rows in (1, 2, 7, 13, 97, 200):
            x, residual = torch.randn(rows, k), torch.randn(rows, n)
            want = native.linear(x, dense, residual=residual)
            assert torch.equal(native.linear(x, packed, residual=residual), want), (n, k, rows)


@pytest.mark.parametrize("fmt", [INT8[0], INT8[2], INT4[0], INT4[3]], ids=by_name)
def test_parts_unpack_to_what_was_packed(any_ops, fmt):
    ops = any_ops
    weight = random_weight(40, 128, fmt)
    packed = ops.empty_linear(40, 128, fmt)
    for first, end in ((0, 7), (7, 32), (32, 40)):
        zeros = None if weight.zeros is None else weight.zeros[first:end]
        part = Quantized(weight.codes[first:end], weight.scales[first:end], zeros)
        ops.fill_linear(packed, first, part)
    assert torch.equal(ops.unpack_linear(packed), weight.dequant())
    token = torch.tensor([39, 0, 7, 7])
    assert torch.equal(ops.embedding(token, packed), weight.dequant()[token])


def test_scales_are_rounded_once_and_unpack_tells(any_ops):
    fmt = INT4[0]
    weight = random_weight(16, 64, fmt)
    inexact = weight._replace(scales=weight.scales * 1.0003)
    stored = weight._replace(scales=inexact.scales.half().float())
    packed = pack(any_ops, inexact, fmt)
    assert torch.equal(any_ops.unpack_linear(packed), stored.dequant())
    x = torch.randn(3, 64)
    assert torch.equal(any_ops.linear(x, packed), any_ops.linear(x, pack(any_ops, stored, fmt)))


@pytest.mark.parametrize("fmt", [INT8[0], INT4[1]], ids=by_name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(any_ops, fmt, poison):
    packed = pack(any_ops, random_weight(20, 128, fmt), fmt)
    x = torch.randn(3, 128)
    clean = any_ops.linear(x, packed)
    x[1, 100] = poison
    got = any_ops.linear(x, packed)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_groups_that_do_not_divide_the_width_are_refused(any_ops):
    with pytest.raises(EngineError, match="groups of 64"):
        any_ops.empty_linear(16, 100, INT4[2])


SHAPES = {0: [(1, 1), (37, 7), (16, 64), (272, 255), (100, 1000), (530, 896)]}
GROUPED = [(1, 128), (37, 256), (100, 384), (530, 896)]


@pytest.mark.parametrize("fmt", INT8 + INT4, ids=by_name)
def test_native_bits_are_the_same_as_the_formula_written_out(native, fmt):
    for n, k in SHAPES.get(fmt.group, GROUPED):
        weight, bias = random_weight(n, k, fmt), torch.randn(n)
        layers = [pack(ops, weight, fmt, bias) for ops in (native, REFERENCE)]
        plain = [pack(ops, weight, fmt) for ops in (native, REFERENCE)]
        for rows in (1, 2, 3, 4, 5, 7, 12, 13, 26, 70):
            x = torch.randn(rows, k) * torch.logspace(-3, 3, rows).unsqueeze(1)
            residual = torch.randn(rows, n)
            want = REFERENCE.linear(x, layers[1], residual=residual)
            assert torch.equal(native.linear(x, layers[0], residual=residual), want), (n, k, rows)
            assert torch.equal(native.linear(x, plain[0]), REFERENCE.linear(x, plain[1]))


def hostile_rows(k):
    torch.manual_seed(3)
    rows = torch.randn(12, k)
    rows[0] = 3.0
    rows[1] = torch.randint(0, 2, (k,)) * 200.0 - 100.0
    rows[2] *= 1e-41
    rows[3] = 0.0
    rows[4] = 0.0
    rows[4, 5] = 1e30
    rows[5, 0], rows[6, k - 1], rows[7, k // 2] = float("nan"), float("inf"), -float("inf")
    rows[8] *= 2.0**-119
    rows[9] *= 3e38 / 4
    rows[10] = torch.arange(k) % 255 / 2.0 - 63.25  # halves: ties
    return rows


@pytest.mark.parametrize("fmt", [INT8[0], INT8[3], INT4[0], INT4[5]], ids=by_name)
def test_hostile_rows_give_the_same_bits_as_the_formula(native, fmt):
    x = hostile_rows(384)
    for codes in ("random", "extreme"):
        weight = random_weight(50, 384, fmt)
        if codes == "extreme":
            least, most = weight.codes.min(), weight.codes.max()
            weight.codes.copy_(torch.where(torch.rand(50, 384) < 0.5, least, most))
            weight.codes[0] = most
        layers = [pack(ops, weight, fmt) for ops in (native, REFERENCE)]
        for rows in (x, x[4:8], x[5:6], x[:1]):
            got, want = native.linear(rows, layers[0]), REFERENCE.linear(rows, layers[1])
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got.isfinite().all()


@pytest.mark.parametrize("fmt", [INT8[0], INT8[1], INT4[1], INT4[2]], ids=by_name)
def test_native_row_is_the_same_however_batched(native, fmt):
    packed = pack(native, random_weight(200, 896, fmt), fmt)
    x = torch.randn(600, 896)
    alone = torch.cat([native.linear(row, packed) for row in x.split(1)])
    for size in (2, 3, 5, 8, 16, 33, 64, 65, 200, 600):
        for start in {0, 600 - size, (600 - size) // 2}:
            got = native.linear(x[start : start + size], packed)
            assert torch.equal(got, alone[start : start + size]), (size, start)


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_threads_do_not_change_quantized_results(native, rows):
    packed = pack(native, random_weight(1000, 256, INT4[0]), INT4[0])
    x = torch.randn(rows, 256)
    try:
        results = []
        for threads in (1, 2, 5):
            kernels.set_num_threads(threads)
            results.append(native.linear(x, packed))
    finally:
        kernels.set_num_threads()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_quantized_layer_refuses_floats_and_the_other_way_round(native):
    with pytest.raises(EngineError, match="takes quantized"):
        native.fill_linear(native.empty_linear(16, 64, INT4[0]), 0, torch.zeros(16, 64))
    weight = random_weight(16, 64, INT4[0])
    with pytest.raises(EngineError, match="other codes"):
        native.fill_linear(native.empty_linear(16, 64, F32), 0, weight)
    with pytest.raises(EngineError, match="other codes"):
        native.fill_linear(native.empty_linear(16, 64, INT4[1]), 0, weight)
    with pytest.raises(EngineError, match="do not know format int8-g16"):
        native.empty_linear(16, 64, Format(name="int8-g16", bits=8, group=16, activations="int8"))


def test_int8_probe_measures_a_plausible_rate():
    if not kernels.native_available():
        pytest.skip("native kernels are not built (tools/build_native.sh)")
    from coppice.kernels import _native

    assert 1e8 < _native.int8_probe(2000) < 1e15
