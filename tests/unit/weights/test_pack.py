"""The pack file: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coppice.weights.pack import ALIGN, PackWriter, tensors_of
from coppice.weights.stored import DamagedPackError, checksum, load_pack


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(33, 7, generator=generator),
        "b": torch.randn(1000, generator=generator).bfloat16(),
        "c": torch.randint(-127, 128, (16, 3, 4), generator=generator, dtype=torch.int8),
        "d": torch.randn(5, generator=generator).half(),
        "none": torch.empty(0, 4),
    }


def read_pack(path: Path, key: str) -> Mapping[str, Tensor]:
    return tensors_of(load_pack(path, key))


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


def test_a_checksum_notices_any_change() -> None:
    data = bytes(range(256)) * 5 + b"the rest"
    whole = checksum(memoryview(data))
    changed = {checksum(memoryview(data[:size])) for size in range(len(data))}
    for at in range(len(data)):
        for bit in (1, 128):
            flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            changed.add(checksum(memoryview(flipped)))
    assert whole not in changed
    assert len(changed) == 3 * len(data)  # nor do any two of them agree


def test_two_flips_in_a_lane_do_not_cancel() -> None:
    data = bytearray(4096)
    whole = checksum(memoryview(bytes(data)))
    for first, second in ((3, 3 + 128), (3, 3 + 256), (0, 128), (131, 3 + 1024)):
        both = bytearray(data)
        both[first] ^= 0x80
        both[second] ^= 0x80
        assert checksum(memoryview(bytes(both))) != whole
