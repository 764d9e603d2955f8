"""The storage of KV pages: one tensor pair per layer, all of one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coppice.errors import ConfigError
from coppice.kernels.pages import empty_pages, give_back_pages, move_keys, move_values
from coppice.models.kv import KVLayout


class KVPool:
    """K and V of all pages, a tensor of `KVLayout.shape` each per layer.

    Args:
        layout: shapes and dtype.
        num_pages: pages to hold; memory is touched as pages are first written.

    Raises:
        ConfigError: there is not that much memory.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        self.layout = layout
        self.num_pages = num_pages
        shape = (2 * layout.num_layers, *layout.shape(num_pages))
        try:
            self._all = empty_pages(shape, layout.dtype, layout.device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"{num_pages} KV pages take {num_pages * layout.page_bytes >> 20} MiB, which this "
                "machine does not give; lower kv_cache_mib.", param="kv_cache_mib",
            ) from error  # fmt: skip
        self.k: list[Tensor] = list(self._all[0::2])
        self.v: list[Tensor] = list(self._all[1::2])

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page's K and V of every layer (copy-on-write of a shared tail)."""
        self._all[:, dst].copy_(self._all[:, src])

    def give_back(self, free: Sequence[int]) -> None:
        """Let the system have the memory of pages nobody holds, ascending."""
        give_back_pages(self._all, free)

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of every byte of a page, ``[page_bytes]``."""
        return self._bytes[:, page].flatten()

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """Fill a page with what `read_page` gave."""
        bytes_ = self._bytes
        bytes_[:, page] = data.reshape(len(bytes_), -1)

    @property
    def _bytes(self) -> NDArray[np.uint8]:
        """The pages' memory as ``[2 * layers, P, bytes]``, copied by one thread unlike a tensor."""
        made: NDArray[np.uint8] = self._all.flatten(2).view(torch.uint8).numpy()
        return made

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
