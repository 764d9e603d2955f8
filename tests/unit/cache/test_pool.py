"""A pool that memory does not hold says which setting to lower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coppice.cache import pool
from coppice.errors import ConfigError
from coppice.models.kv import KVLayout


def test_a_pool_beyond_memory_names_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("can't allocate memory")

    layout = KVLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert pool.KVPool(layout, 4).num_pages == 4
    monkeypatch.setattr(pool, "empty_pages", refuse)
    with pytest.raises(ConfigError, match="lower kv_cache_mib"):
        pool.KVPool(layout, 4)
