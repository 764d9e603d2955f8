"""The pack file: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coppice.weights.pack import ALIGN, DamagedPackError, PackWriter, read_pack


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(33, 7, generator=generator),
        "b": torch.randn(1000, generator=generator).bfloat16(),
        "c": torch.randint(-127, 128, (16, 3, 4), generator=generator, dtype=torch.int8),
        "d": torch.randn(5, generator=generator).half(),
        "none": torch.empty(0, 4),
    }


def write(path: Path) -> None:
    with PackWriter(path, "key") as pack:
        for name, tensor in tensors().items():
            pack.add(name, tensor)


def test_out_comes_what_went_in(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "w.pack"
    write(path)
    found = read_pack(path, "key")
    assert list(found) == list(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].numel() == 0 or found[name].data_ptr() % ALIGN == 0
    assert [p.name for p in path.parent.iterdir()] == ["w.pack"]


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pack"
    write(path)
    read_pack(path, "key")["a"].zero_()
    assert torch.equal(read_pack(path, "key")["a"], tensors()["a"])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PackWriter(tmp_path / "w.pack", "key") as pack:
        pack.add("a", tensors()["a"])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_another_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "w.pack")
    with pytest.raises(DamagedPackError, match="another model"):
        read_pack(tmp_path / "w.pack", "other")
    with pytest.raises(FileNotFoundError):
        read_pack(tmp_path / "absent.pack", "key")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.pack"
    write(path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedPackError):
            read_pack(path, "key")


def test_every_flipped_byte_that_counts_is_noticed(tmp_path: Path) -> None:
    """Padding between tensors is not data; everything else is checked."""
    path = tmp_path / "w.pack"
    write(path)
    whole, noticed = path.read_bytes(), 0
    for at in range(0, len(whole), 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            found = read_pack(path, "key")
        except DamagedPackError:
            noticed += 1
        else:
            assert all(torch.equal(found[name], t) for name, t in tensors().items())
    assert noticed > 50
