"""The storage of KV pages: one tensor pair per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache. ``window`` per layer lives with the model, not here."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes one page takes over all layers, K and V."""
        per_layer = 2 * self.num_kv_heads * self.page_size * self.head_dim
        return per_layer * self.num_layers * self.dtype.itemsize


class KVPool:
    """K and V of all pages, ``[num_pages, num_kv_heads, page_size, head_dim]`` per layer.

    Args:
        layout: shapes and dtype.
        num_pages: pages to hold; memory is touched as pages are first written.
        device: where the tensors live.
    """

    def __init__(self, layout: KVLayout, num_pages: int, device: str = "cpu") -> None:
        shape = (num_pages, layout.num_kv_heads, layout.page_size, layout.head_dim)
        self.layout = layout
        self.num_pages = num_pages
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for _ in range(layout.num_layers):
            self.k.append(torch.zeros(shape, dtype=layout.dtype, device=device))
            self.v.append(torch.zeros(shape, dtype=layout.dtype, device=device))

    def copy_page(self, src: int, dst: int) -> None:
        """Copy one page's K and V of every layer (copy-on-write of a shared tail)."""
        for k, v in zip(self.k, self.v, strict=True):
            k[dst].copy_(k[src])
            v[dst].copy_(v[src])
