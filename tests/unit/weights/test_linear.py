"""`Linear`: parts packed into one layer, precision kept, errors that name the layer."""

import pytest
import torch

from coppice.errors import CheckpointError
from coppice.kernels import get_ops
from coppice.weights import BF16, F32, Format, Linear, Part, Quantized
from coppice.weights.names import integer_format
from coppice.weights.rounding import round_to_nearest


@pytest.fixture(params=["reference", "native"])
def ops(request):
    if request.param == "native":
        pytest.importorskip("coppice.kernels._native", reason="native kernels not built")
    return get_ops("cpu", prefer=request.param)


@pytest.mark.parametrize("format", [F32, BF16])
@pytest.mark.parametrize("sizes", [(32, 16, 16), (33, 7, 7), (5,)])
def test_parts_equal_concatenation(ops, format, sizes):
    torch.manual_seed(0)
    dtype = torch.float32 if format == F32 else torch.bfloat16
    parts = [Part(torch.randn(n, 40).to(dtype), torch.randn(n)) for n in sizes]
    layer = Linear.pack(
        ops, "qkv", (p for p in parts), shape=(sum(sizes), 40), format=format, bias=True
    )
    whole = torch.cat([p.weight for p in parts]).float()
    assert torch.equal(layer.dequant(), whole)
    x = torch.randn(9, 40)
    want = x.double() @ whole.double().T + torch.cat([p.bias for p in parts]).double()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)
    residual = torch.randn_like(want).float()
    torch.testing.assert_close(
        layer(x, residual).double(), want + residual.double(), rtol=1e-5, atol=1e-5
    )


def test_gather_returns_weight_rows(ops):
    weight = torch.randn(37, 24).bfloat16()
    layer = Linear.from_tensor(ops, "embed", weight)
    assert layer.format == BF16
    token = torch.tensor([36, 0, 5, 5], dtype=torch.int32)
    assert torch.equal(layer.gather(token), weight[token.long()].float())


def test_float16_checkpoint_becomes_float32_exactly(ops):
    weight = torch.randn(20, 8).half()
    layer = Linear.from_tensor(ops, "w", weight)
    assert layer.format == F32
    assert torch.equal(layer.dequant(), weight.float())


def test_packing_rounds_float32_to_nearest_even_bfloat16(ops):
    weight = torch.randn(50, 33) * torch.logspace(-6, 6, 33)
    layer = Linear.from_tensor(ops, "w", weight, format=BF16)
    assert torch.equal(layer.dequant(), weight.bfloat16().float())


def test_source_may_change_after_packing(ops):
    weight = torch.ones(16, 16)
    layer = Linear.from_tensor(ops, "w", weight)
    weight.zero_()
    assert torch.equal(layer.dequant(), torch.ones(16, 16))


@pytest.mark.parametrize(
    ("parts", "bias"),
    [
        ([Part(torch.zeros(8, 5))], False),
        ([Part(torch.zeros(4, 4))], False),
        ([Part(torch.zeros(9, 4))], False),
        ([Part(torch.zeros(8, 4, dtype=torch.int8))], False),
        ([Part(torch.zeros(8))], False),
        ([Part(torch.zeros(8, 4))], True),
        ([Part(torch.zeros(8, 4), torch.zeros(7))], True),
        ([Part(torch.zeros(8, 4), torch.zeros(8))], False),
    ],
)
def test_contradicting_parts_are_refused(ops, parts, bias):
    with pytest.raises(CheckpointError, match="layer0"):
        Linear.pack(ops, "layer0", parts, shape=(8, 4), format=F32, bias=bias)


INT8 = Format(name="int8", bits=8, activations="int8")
INT4 = Format(name="int4-g32", bits=4, group=32, activations="int8")
ASYMMETRIC = Format(name="int4-g32", bits=4, group=32, zero_points=True)


def quantized(rows=4, groups=2, value=3, scale=1.0, zeros=None):
    codes = torch.full((rows, 64), value, dtype=torch.int8)
    found = None if zeros is None else torch.full((rows, groups), zeros, dtype=torch.int8)
    return Quantized(codes, torch.full((rows, groups), scale), found)


@pytest.mark.parametrize(
    ("format", "weight", "message"),
    [
        (INT4, torch.zeros(4, 64), "floats; quantize"),
        (F32, quantized(), "integer codes"),
        (INT4, quantized()._replace(codes=torch.zeros(4, 64)), "not int8"),
        (INT4, quantized(value=8), "range -8 to 7"),
        (INT8, quantized(groups=1, value=-128), "range -127 to 127"),
        (INT4, quantized(groups=1), r"scales are torch.float32 \[4, 1\]"),
        (INT4, quantized(scale=float("nan")), "not finite"),
        (INT4, quantized(scale=1e5), "not finite in torch.float16"),
        (INT4, quantized(zeros=3), "not wanted"),
        (ASYMMETRIC, quantized(), "missing"),
        (ASYMMETRIC, quantized(zeros=16), "zero points leave"),
        (ASYMMETRIC, quantized(groups=1, zeros=3), "scales"),
        (INT4, quantized(rows=5), "expected a"),
    ],
)
def test_contradicting_quantized_parts_are_refused(format, weight, message):
    ops = get_ops(prefer="reference")
    with pytest.raises(CheckpointError, match=message):
        Linear.pack(ops, "layer0", [Part(weight)], shape=(4, 64), format=format)


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(CheckpointError, match=r"layer0: 40 inputs .* groups of 32"):
        Linear.pack(get_ops(prefer="reference"), "layer0", [], shape=(4, 40), format=INT4)


def test_quantized_parts_make_one_layer():
    parts = [quantized(2, value=1), quantized(2, value=-5, scale=0.5)]
    ops = get_ops(prefer="reference")
    layer = Linear.pack(ops, "qkv", map(Part, parts), shape=(4, 64), format=INT4)
    assert torch.equal(layer.dequant(), torch.cat([part.dequant() for part in parts]))
    assert layer.nbytes < 4 * 64 * 2


@pytest.mark.parametrize(
    ("bits", "group", "zero_points"),
    [(8, 0, False), (8, 32, False), (4, 32, False), (4, 128, False), (4, 64, True)],
)
def test_one_weight_meets_float_and_int8_rows(ops, bits, group, zero_points):
    """The codes packed for one kind of rows are those of the other: no second copy is made."""
    torch.manual_seed(0)
    forms = {
        rows: integer_format(bits, group, zero_points=zero_points, activations=rows)
        for rows in ("float", "int8")
    }
    weight = round_to_nearest(torch.randn(37, 256), forms["float"])
    x = torch.randn(5, 256)
    layers = {
        rows: Linear.pack(ops, "w", [Part(weight)], shape=(37, 256), format=form)
        for rows, form in forms.items()
    }
    assert not torch.equal(layers["float"](x), layers["int8"](x))
    for rows, layer in layers.items():
        other = "int8" if rows == "float" else "float"
        turned = layer.with_activations(other)
        assert turned.format == forms[other]
        assert torch.equal(turned(x), layers[other](x))
        assert {t.data_ptr() for t in turned.tensors.values()} == {
            t.data_ptr() for t in layer.tensors.values()
        }
        assert layer.with_activations(rows) is layer


def test_floats_meet_nothing_but_floats(ops):
    layer = Linear.from_tensor(ops, "w", torch.randn(16, 32))
    assert layer.with_activations("int8") is layer
