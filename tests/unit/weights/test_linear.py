"""`Linear`: parts packed into one layer, precision kept, errors that name the layer."""

import pytest
import torch

from coppice.errors import CheckpointError
from coppice.kernels import get_ops
from coppice.weights import Linear, Part


@pytest.fixture(params=["reference", "native"])
def ops(request):
    if request.param == "native":
        pytest.importorskip("coppice.kernels._native", reason="native kernels not built")
    return get_ops("cpu", prefer=request.param)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("sizes", [(32, 16, 16), (33, 7, 7), (5,)])
def test_parts_equal_concatenation(ops, kind, sizes):
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    parts = [Part(torch.randn(n, 40).to(dtype), torch.randn(n)) for n in sizes]
    layer = Linear.pack(
        ops, "qkv", (p for p in parts), shape=(sum(sizes), 40), kind=kind, bias=True
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
    assert layer.kind == "bf16"
    token = torch.tensor([36, 0, 5, 5], dtype=torch.int32)
    assert torch.equal(layer.gather(token), weight[token.long()].float())


def test_float16_checkpoint_becomes_float32_exactly(ops):
    weight = torch.randn(20, 8).half()
    layer = Linear.from_tensor(ops, "w", weight)
    assert layer.kind == "f32"
    assert torch.equal(layer.dequant(), weight.float())


def test_packing_rounds_float32_to_nearest_even_bfloat16(ops):
    weight = torch.randn(50, 33) * torch.logspace(-6, 6, 33)
    layer = Linear.from_tensor(ops, "w", weight, kind="bf16")
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
        Linear.pack(ops, "layer0", parts, shape=(8, 4), kind="f32", bias=bias)
