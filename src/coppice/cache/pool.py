"""The storage of KV pages: one tensor pair per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coppice.kernels.pages import empty_pages, move_keys, move_values
from coppice.models.kv import KVLayout


class KVPool:
    """K and V of all pages, a tensor of `KVLayout.shape` each per layer.

    Args:
        layout: shapes and dtype.
        num_pages: pages to hold; memory is touched as pages are first written.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        shape = layout.shape(num_pages)
        self.layout = layout
        self.num_pages = num_pages
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for _ in range(layout.num_layers):
            self.k.append(empty_pages(shape, layout.dtype, layout.device))
            self.v.append(empty_pages(shape, layout.dtype, layout.device))

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page's K and V of every layer (copy-on-write of a shared tail)."""
        for k, v in zip(self.k, self.v, strict=True):
            k[dst].copy_(k[src])
            v[dst].copy_(v[src])

    def move(self, pages: Sequence[int], moves: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of token indexes of one sequence, all read before any is written.

        Args:
            pages: the sequence's pages.
            moves: ``(from, to)`` token indexes.
        """
        size = self.layout.page_size
        table = torch.tensor(list(pages))
        src, dst = torch.tensor(list(moves)).unbind(1)
        to, source = (table[dst // size], dst % size), (table[src // size], src % size)
        for k, v in zip(self.k, self.v, strict=True):
            move_keys(k, to, source)
            move_values(v, to, source)
