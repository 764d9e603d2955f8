"""The page layout as Python sees it: what is written is read, and moves keep every bit."""

import pytest
import torch

from coppice.errors import EngineError
from coppice.kernels import pages as layout

HEADS, SIZE, DIM = 3, 32, 20


def places(slots):
    table, slots = torch.tensor([2, 0, 1]), torch.tensor(slots)
    return table[slots // SIZE], slots % SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(dtype):
    slots = list(range(70))
    x = torch.randn(len(slots), HEADS, DIM).to(dtype).float()
    for write, read in (
        (layout.write_keys, layout.read_keys),
        (layout.write_values, layout.read_values),
    ):
        store = torch.full(layout.page_shape(3, HEADS, SIZE, DIM, dtype), torch.nan, dtype=dtype)
        write(store, *places(slots), x)
        assert torch.equal(read(store, *places(slots), DIM), x)
        one = read(store, *places([37, 5]), DIM)
        assert torch.equal(one, x[[37, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_moves_read_before_they_write(dtype):
    x = torch.randn(70, HEADS, DIM)
    source, to = [40, 41, 42, 15], [41, 42, 43, 64]
    for write, move, read in (
        (layout.write_keys, layout.move_keys, layout.read_keys),
        (layout.write_values, layout.move_values, layout.read_values),
    ):
        store = torch.zeros(layout.page_shape(3, HEADS, SIZE, DIM, dtype), dtype=dtype)
        write(store, *places(list(range(70))), x)
        want = read(store, *places(list(range(70))), DIM)
        want[to] = want[source]
        move(store, places(to), places(source))
        assert torch.equal(read(store, *places(list(range(70))), DIM), want)


def test_pages_are_whole_groups():
    with pytest.raises(EngineError, match="multiple of 16 tokens, not 24"):
        layout.page_shape(1, 1, 24, 64, torch.float32)
