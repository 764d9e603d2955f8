"""The shape of a model's KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from coppice.kernels.pages import page_shape


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of the KV cache. ``window`` per layer lives with the model, not here."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device

    def shape(self, num_pages: int) -> tuple[int, ...]:
        """Shape of one layer's K pages, and of its V pages (see `coppice.kernels.pages`)."""
        return page_shape(num_pages, self.num_kv_heads, self.page_size, self.head_dim, self.dtype)

    def stored_as(self, kind: Literal["auto", "int8"]) -> KVLayout:
        """The same cache in another type: ``auto`` is this one."""
        return self if kind == "auto" else replace(self, dtype=torch.int8)

    @property
    def page_bytes(self) -> int:
        """Bytes one page takes over all layers, K and V."""
        return 2 * self.num_layers * math.prod(self.shape(1)) * self.dtype.itemsize


class KVPages(Protocol):
    """Per layer, the K and V pages, each of `KVLayout.shape`."""

    k: list[Tensor]
    v: list[Tensor]
