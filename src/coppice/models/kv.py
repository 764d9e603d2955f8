"""The shape of a model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
    device: torch.device

    @property
    def page_bytes(self) -> int:
        """Bytes one page takes over all layers, K and V."""
        per_layer = 2 * self.num_kv_heads * self.page_size * self.head_dim
        return per_layer * self.num_layers * self.dtype.itemsize


class KVPages(Protocol):
    """Per layer, the K and V pages ``[num_pages, num_kv_heads, page_size, head_dim]``."""

    k: list[Tensor]
    v: list[Tensor]
