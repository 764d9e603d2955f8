"""Packed integers: known words, round trips, orders of groups."""

from __future__ import annotations

import pytest
import torch

from coppice.errors import CheckpointError
from coppice.weights.packing import grouped_order, pack, unpack, unpack_awq


def test_the_lowest_bits_come_first() -> None:
    assert unpack(torch.tensor([0x76543210], dtype=torch.int32), 4).tolist() == list(range(8))
    assert unpack(torch.tensor([0x03020100], dtype=torch.int32), 8).tolist() == [0, 1, 2, 3]
    negative = torch.tensor([-1], dtype=torch.int32)
    assert unpack(negative, 4).tolist() == [15] * 8


def test_awq_words_hold_columns_in_their_own_order() -> None:
    # Slots from the lowest: columns 0, 2, 4, 6, 1, 3, 5, 7.
    word = sum(column << (4 * slot) for slot, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    words = torch.tensor([[word, word]]).to(torch.int64)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    assert unpack_awq(signed).tolist() == [[*range(8), *range(8)]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [8, 13, 64])
def test_packing_and_unpacking_give_the_same(bits: int, width: int) -> None:
    random = torch.Generator().manual_seed(width)
    values = torch.randint(0, 2**bits, (5, width), generator=random)
    words = pack(values, bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits)[:, :width].long(), values)


def test_order_brings_groups_together() -> None:
    group_of = torch.tensor([1, 0, 1, 0])
    order = grouped_order(group_of, 2, "g_idx")
    assert order is not None and group_of[order].tolist() == [0, 0, 1, 1]
    assert grouped_order(torch.tensor([0, 0, 1, 1]), 2, "g_idx") is None


@pytest.mark.parametrize("index", [[0, 0, 0, 1], [0, 0, 2, 2], [-1, 0, 1, 1]])
def test_uneven_groups_are_refused(index: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.g_idx does not put exactly 2"):
        grouped_order(torch.tensor(index), 2, "x.g_idx")
