"""A row's logits are the same bits whatever is computed beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coppice.cache.pool import KVPool
from coppice.errors import EngineError
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.models.load import load_model
from tools.make_model import SHAPES, make_model

TOYS = [name for name in SHAPES if name.startswith("toy")]
PAGE = 16


def join(first: Rows, second: Rows) -> Rows:
    """Two one-sequence batches as one."""
    shift = first.num_rows
    parts: dict[str, Any] = {
        name: torch.cat([getattr(first, name), getattr(second, name)])
        for name in ("token", "position", "slot", "adapter", "page_table", "prefix_len")
    }
    parts["sequence"] = torch.cat([first.sequence, second.sequence + 1])
    moved = torch.where(second.parent >= 0, second.parent + shift, second.parent)
    parts["parent"] = torch.cat([first.parent, moved])
    parts["logit_rows"] = torch.cat([first.logit_rows, second.logit_rows + shift])
    return Rows(**parts)


@pytest.fixture(scope="module", params=[(n, d) for n in TOYS for d in ("float32", "bfloat16")])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    shape, dtype = request.param
    folder: Path = tmp_path_factory.mktemp(shape)
    make_model(shape, folder, dtype=dtype, tokenizer=False)
    return load_model(folder).decoder


@torch.inference_mode()
def test_rows_stand_alone(decoder: Decoder) -> None:
    one = [(7 * i) % 500 for i in range(120)]
    two = [(11 * i + 3) % 500 for i in range(45)]
    pages = [list(range(16)), list(range(16, 32))]

    def fresh() -> KVPool:
        return KVPool(decoder.kv_layout(PAGE), 32)

    alone = decoder.forward(Rows.chunk(one, pages[0]), fresh())
    other = decoder.forward(Rows.chunk(two, pages[1]), fresh())

    both = decoder.forward(join(Rows.chunk(one, pages[0]), Rows.chunk(two, pages[1])), fresh())
    assert torch.equal(both[:120], alone)
    assert torch.equal(both[120:], other)

    pool = fresh()
    chunks = [
        decoder.forward(Rows.chunk(one[i : i + 7], pages[0], start=i), pool)
        for i in range(0, 120, 7)
    ]
    assert torch.equal(torch.cat(chunks), alone)

    some = torch.tensor([0, 63, 119], dtype=torch.int32)
    few = decoder.forward(replace(Rows.chunk(one, pages[0]), logit_rows=some), fresh())
    assert torch.equal(few, alone[[0, 63, 119]])
    none = torch.empty(0, dtype=torch.int32)
    nothing = decoder.forward(replace(Rows.chunk(one, pages[0]), logit_rows=none), fresh())
    assert nothing.shape == (0, 512)


def test_kv_layout_follows_the_weights(tmp_path: Path) -> None:
    make_model("toy-llama", tmp_path, tokenizer=False)
    layout = load_model(tmp_path).decoder.kv_layout(16)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (4, 2, 16)
    assert layout.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32").decoder.kv_layout(16).dtype == torch.float32


def test_position_beyond_the_served_context(tmp_path: Path) -> None:
    make_model("toy-llama", tmp_path, tokenizer=False)
    decoder = load_model(tmp_path, max_context=16).decoder
    pool = KVPool(decoder.kv_layout(16), 4)
    decoder.forward(Rows.chunk([1], [0, 1, 2], start=15), pool)
    with pytest.raises(EngineError, match="beyond the context 16"):
        decoder.forward(Rows.chunk([1], [0, 1, 2], start=16), pool)
