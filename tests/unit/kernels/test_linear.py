"""Packed linear layers against float64, and their batch invariance bit for bit."""

import pytest
import torch

from coppice import kernels
from coppice.errors import EngineError
from coppice.kernels.formats import BF16
from tests.unit.kernels.exact import linear

SHAPES = [(16, 16), (64, 48), (37, 7), (1, 1), (100, 1000), (272, 255), (896, 257)]
BATCHES = [1, 2, 3, 5, 8, 16, 33, 64, 200]


def error_bound(x, weight):
    """Rounding error of a sum of K float32 products, with room to spare."""
    size = x.abs().double() @ weight.abs().double().T
    return size * 2**-23 * (2 + 0.5 * x.shape[1] ** 0.5) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 13, 100])
def test_matches_float64(native, shape, dtype, rows):
    torch.manual_seed(rows)
    n, k = shape
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    x, residual = torch.randn(rows, k), torch.randn(rows, n)
    packed = native.pack_linear(weight, bias)
    bound = error_bound(x, weight) + 1e-5
    got = native.linear(x, packed, residual=residual)
    assert ((got - linear(x, weight, bias, residual)).abs() <= bound).all()
    got = native.linear(x, native.pack_linear(weight))
    assert ((got - linear(x, weight)).abs() <= bound).all()


@pytest.mark.parametrize("x", ["constant", "hundreds", "denormal", "one huge"])
def test_hostile_rows(native, x):
    torch.manual_seed(0)
    weight = torch.randn(40, 300)
    rows = {
        "constant": torch.full((20, 300), 3.0),
        "hundreds": torch.randint(0, 2, (20, 300)) * 200.0 - 100.0,
        "denormal": torch.randn(20, 300) * 1e-41,
        "one huge": torch.nn.functional.one_hot(torch.arange(20), 300).float() * 1e30,
    }[x]
    got = native.linear(rows, native.pack_linear(weight))
    # A denormal product may lose all but its last bits: allow half a unit for each.
    bound = error_bound(rows, weight) + 300 * 2.0**-149
    assert ((got - linear(rows, weight)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(896, 320), (200, 1000), (52, 513)])
def test_row_is_the_same_however_batched(native, shape, dtype):
    torch.manual_seed(1)
    n, k = shape
    packed = native.pack_linear(torch.randn(n, k).to(dtype), torch.randn(n))
    x = torch.randn(max(BATCHES), k)
    alone = torch.cat([native.linear(x[i : i + 1], packed) for i in range(len(x))])
    for size in BATCHES:
        for start in {0, len(x) - size, (len(x) - size) // 2}:
            got = native.linear(x[start : start + size], packed)
            assert torch.equal(got, alone[start : start + size]), (size, start)


def test_reference_row_is_the_same_however_batched(any_ops):
    torch.manual_seed(1)
    packed = any_ops.pack_linear(torch.randn(200, 320))
    x = torch.randn(64, 320)
    whole = any_ops.linear(x, packed)
    for size in (1, 3, 8, 17):
        got = torch.cat([any_ops.linear(part, packed) for part in x.split(size)])
        assert torch.equal(got, whole), size


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_threads_do_not_change_results(native, rows):
    packed = native.pack_linear(torch.randn(1000, 300).bfloat16())
    x = torch.randn(rows, 300)
    try:
        results = []
        for threads in (1, 2, 5):
            kernels.set_num_threads(threads)
            results.append(native.linear(x, packed))
    finally:
        kernels.set_num_threads()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty_batch_gives_no_rows(any_ops):
    packed = any_ops.pack_linear(torch.randn(20, 8))
    assert any_ops.linear(torch.empty(0, 8), packed).shape == (0, 20)


def test_transposed_input_is_read_correctly(any_ops):
    weight, x = torch.randn(20, 8), torch.randn(8, 5).T
    got = any_ops.linear(x, any_ops.pack_linear(weight))
    torch.testing.assert_close(got.double(), linear(x, weight), rtol=1e-5, atol=1e-5)


def test_wrong_width_is_refused(native):
    with pytest.raises(EngineError, match="8 features"):
        native.linear(torch.zeros(2, 8), native.pack_linear(torch.zeros(16, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_inverts_pack(native, dtype):
    weight = torch.randn(53, 77).to(dtype)
    assert torch.equal(native.unpack_linear(native.pack_linear(weight)), weight)


def test_bfloat16_rounding_is_to_nearest_even(native):
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 96), dtype=torch.int32)
    weight = bits.view(torch.float32).nan_to_num(0.0, 3e38, -3e38)
    ties = torch.arange(96, dtype=torch.int32) * 0x10000 + 0x3F808000
    weight[0] = ties.view(torch.float32)
    packed = native.empty_linear(64, 96, BF16)
    native.fill_linear(packed, 0, weight)
    assert torch.equal(native.unpack_linear(packed), weight.bfloat16())


def test_embedding_token_outside_vocabulary_is_refused(native):
    packed = native.pack_linear(torch.randn(20, 8))
    for token in (-1, 20):
        with pytest.raises(IndexError, match="vocabulary"):
            native.embedding(torch.tensor([0, token]), packed)
