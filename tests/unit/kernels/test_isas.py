"""Instruction sets with fused multiply-add agree bit for bit; so does a machine's user."""

import pytest
import torch

from coppice import kernels
from coppice.errors import ConfigError
from coppice.kernels.pages import page_shape
from coppice.kernels.rows import Rows
from tests.unit.kernels.quantizing import INT4, INT8, pack, random_weight

FUSED = [name for name in kernels.available_isas() if name != "portable"]


def forward(ops):
    """A little of everything, as one tuple of tensors."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(70, 300, generator=generator)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        packed = ops.pack_linear(torch.randn(530, 300, generator=generator).to(dtype))
        results += [ops.linear(x[:n], packed) for n in (1, 2, 3, 7, 12, 13, 25, 70)]
        table = list(range(5))
        rows = Rows.chunk([0] * 70, table)
        cos_sin = torch.randn(80, 2, 20, generator=generator)
        qkv = torch.randn(70, 8 * 40, generator=generator) * 3
        weights = torch.randn(40, generator=generator)
        norm = {"qk_norm": "head", "q_weight": weights, "k_weight": weights}
        options = {"scale": 0.2, "window": 37, "softcap": 9.0, "sinks": torch.ones(4)}
        for kept in (dtype, torch.int8):
            pages = torch.zeros(2, *page_shape(5, 2, 16, 40, kept), dtype=kept)
            q = ops.rope_append(qkv, rows, *pages, cos_sin, num_heads=4, **norm)
            results += [q, pages, ops.attention(q, rows, *pages, **options)]
    results += [ops.gated_activation(x * 9, kind) for kind in ("silu", "gelu_tanh", "gelu")]
    results.append(ops.rms_norm(x, torch.ones(300), eps=1e-6))
    return results


def quantized(ops):
    """Quantized layers of every format, on row counts that take different tiles."""
    x = torch.randn(70, 384, generator=torch.Generator().manual_seed(8))
    layers = [pack(ops, random_weight(530, 384, fmt), fmt) for fmt in INT8 + INT4]
    return [ops.linear(x[:n], layer) for layer in layers for n in (1, 2, 3, 5, 7, 12, 25, 70)]


@pytest.mark.skipif(len(FUSED) < 2, reason=f"needs two fused instruction sets, has {FUSED}")
def test_instruction_sets_agree_bit_for_bit():
    ops = kernels.get_ops(prefer="native")
    try:
        kernels.set_isa(FUSED[0])
        first = forward(ops)
        for name in FUSED[1:]:
            kernels.set_isa(name)
            for i, (want, got) in enumerate(zip(first, forward(ops), strict=True)):
                assert torch.equal(want, got), (name, i)
    finally:
        kernels.set_isa(kernels.available_isas()[0])


def test_quantized_layers_agree_bit_for_bit_even_with_portable_code():
    ops = kernels.get_ops()
    first = quantized(kernels.get_ops(prefer="reference"))
    try:
        for name in kernels.available_isas():
            kernels.set_isa(name)
            for i, (want, got) in enumerate(zip(first, quantized(ops), strict=True)):
                assert torch.equal(want, got), (name, i)
    finally:
        for name in kernels.available_isas()[:1]:
            kernels.set_isa(name)


def test_repeated_calls_agree_bit_for_bit(native):
    for want, got in zip(forward(native), forward(native), strict=True):
        assert torch.equal(want, got)


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ConfigError, match="cannot run"):
        kernels.set_isa("avx9")


def test_probe_measures_plausible_limits():
    if not kernels.native_available():
        pytest.skip("native kernels are not built (tools/build_native.sh)")
    found = kernels.probe(size_bytes=32 << 20)
    assert 1e8 < found.read_bytes_s < 1e13
    assert 1e8 < found.fma_flop_s < 1e14


def test_thread_count_must_be_positive():
    with pytest.raises(ConfigError, match="at least 1"):
        kernels.set_num_threads(0)


def test_threads_changed_right_after_work_do_not_hang(native):
    """A worker that woke late for the last work took the call to end for it, and slept on."""
    x = torch.randn(64, 2048)
    want = native.gated_activation(x, "silu")
    try:
        for turn in range(200):
            kernels.set_num_threads(2 + turn % 2)
            assert torch.equal(native.gated_activation(x, "silu"), want)
    finally:
        kernels.set_num_threads()
