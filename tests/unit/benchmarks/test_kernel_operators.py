"""Both sides of `benchmarks.kernels` compute the same thing, so that their times compare."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import operators
from coppice.errors import EngineError
from coppice.kernels import get_ops


@pytest.fixture(autouse=True)
def small(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(operators, "BEYOND_CACHE_BYTES", 1)
    monkeypatch.setattr(operators, "LINEARS", {"toy": (96, 128)})
    monkeypatch.setattr(operators, "CONTEXT", 96)
    monkeypatch.setattr(operators, "CHUNK", 8)


@pytest.mark.parametrize("form", operators.FORMATS)
@pytest.mark.filterwarnings("ignore:.*quantized tensor")
def test_linear_layers_agree(form):
    made = list(operators.linears(get_ops(prefer="reference"), form, [1, 5], ["toy"]))
    assert [op.rows for op in made] == [1, 5]
    for op in made:
        ours = op.ours()
        assert ours.shape == (op.rows, 96)
        for call in op.peers.values():
            error = (call().float() - ours).norm() / ours.norm()
            assert error < 0.02  # activations rounded to 8 bits, or bf16, on either side


def test_a_format_the_kernels_lack_is_kept_with_the_reason():
    class Lacking:
        def empty_linear(self, *_args, **_options):
            raise EngineError("not this one")

    (op,) = operators.linears(Lacking(), "int4", [1], ["toy"])
    assert op.ours is None and op.note == "not this one"
    assert op.peers["int4pack_mm"]().shape == (1, 96)


def test_attention_of_the_last_row_agrees():
    decode, prefill = operators.attentions(get_ops())
    assert decode.size_bytes == prefill.size_bytes == 2 * 2 * 96 * 8 * 64
    for op in (decode, prefill):
        ours = op.ours().view(op.rows, 32, 64)
        for call in op.peers.values():
            theirs = call()[0].transpose(0, 1).float()  # unmasked: only the last row is the same
            torch.testing.assert_close(ours[-1], theirs[-1], rtol=0.02, atol=0.02)


def test_small_operators_agree():
    for op in operators.small_ones(get_ops()):
        (call,) = op.peers.values()
        torch.testing.assert_close(op.ours(), call(), rtol=1e-5, atol=1e-5)


def test_a_slow_call_is_timed_once(monkeypatch):
    monkeypatch.setattr(operators, "SLOW_S", 0.0)
    calls = []
    assert operators.seconds_of(lambda: calls.append(1)) > 0
    assert len(calls) == 2
