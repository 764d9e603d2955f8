"""Packed weights are kept, found, and made anew where they cannot be trusted."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.kernels import get_ops
from coppice.kernels.rows import Rows
from coppice.models import load
from coppice.models.load import LoadedModel, load_model
from coppice.models.packs import Kept
from coppice.models.safetensors import SafetensorsSource
from tests.kits.models import SMALL


@pytest.fixture(autouse=True)
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The little test model is worth keeping here."""
    monkeypatch.setattr(load, "PACKED_FROM", 0)


def logits(model: LoadedModel) -> Tensor:
    decoder = model.decoder
    pool = KVPool(decoder.kv_layout(32), 2)
    return decoder.forward(Rows.chunk(list(range(50)), [0, 1]), pool)


def open_model(cache: Path, quantization: str | None = None, prefer: str = "native") -> LoadedModel:
    ops = get_ops(prefer=prefer)  # type: ignore[arg-type]
    return load_model(SMALL, quantization=quantization, ops=ops, kept=Kept(cache))


@pytest.mark.parametrize("prefer", ["native", "reference"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_second_start_reads_no_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str | None, prefer: str
) -> None:
    first = open_model(tmp_path, quantization, prefer)
    expected = logits(first)
    assert len(list((tmp_path / "packs").iterdir())) == 1
    read: list[str] = []
    whole = SafetensorsSource.read

    def watch(self: SafetensorsSource, name: str, dtype: torch.dtype) -> Tensor:
        read.append(name)
        return whole(self, name, dtype)

    monkeypatch.setattr(SafetensorsSource, "read", watch)
    second = open_model(tmp_path, quantization, prefer)
    assert all("norm" in name for name in read)
    assert torch.equal(logits(second), expected)
    assert second.fingerprint == first.fingerprint
    assert second.weight_bytes == first.weight_bytes


def test_formats_and_kernels_have_packs_of_their_own(tmp_path: Path) -> None:
    for quantization in (None, "int8"):
        for prefer in ("native", "reference"):
            open_model(tmp_path, quantization, prefer)
    assert len(list((tmp_path / "packs").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_pack_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = logits(open_model(tmp_path))
    [path] = (tmp_path / "packs").iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:middle], "flip": flipped, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(open_model(tmp_path)), expected)
    assert "made anew" in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "packs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        logits(open_model(tmp_path))
    assert "not kept" in caplog.text


def test_packs_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    folder = tmp_path / "packs"
    for quantization in (None, "int8"):
        open_model(tmp_path, quantization)
    floats, int8 = sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)
    for path, age in ((floats, 100), (int8, 50)):
        os.utime(path, (time.time() - age,) * 2)
    open_model(tmp_path)  # is used again
    most = floats.stat().st_size + int8.stat().st_size
    load_model(SMALL, quantization="int4", kept=Kept(tmp_path, most_bytes=most))
    left = set(folder.iterdir())
    assert floats in left
    assert int8 not in left
    assert sum(path.stat().st_size for path in left) <= most


def test_the_pack_just_made_stays_however_large(tmp_path: Path) -> None:
    open_model(tmp_path)
    load_model(SMALL, quantization="int8", kept=Kept(tmp_path, most_bytes=0))
    [left] = (tmp_path / "packs").iterdir()
    again = load_model(SMALL, quantization="int8", kept=Kept(tmp_path, most_bytes=0))
    assert again.pack is not None
    assert again.pack[0] == left
