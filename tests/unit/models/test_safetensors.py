"""Hostile and damaged safetensors files are refused by name, and nothing else happens."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.safetensors import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    SafetensorsSource,
    parse_header,
)


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob) if length is None else length) + blob + data)
    return path


def refused(path: Path, match: str, error: type[CheckpointError] = CheckpointError) -> None:
    """Opening fails with a message, and leaves no file open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=match):
        SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2).to(torch.float16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource([SafetensorsFile(tmp_path / "x.safetensors")])
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name, torch.float32), tensor.float())
    assert source.read("c", torch.bfloat16).dtype == torch.bfloat16
    source.close()
    source.close()


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float16), torch.float32),
    ],
)
def test_auto_dtype_loses_nothing(tmp_path: Path, kinds: Any, expected: torch.dtype) -> None:
    tensors = {str(i): torch.ones(2, 2, dtype=kind) for i, kind in enumerate(kinds)}
    save_file({**tensors, "norm": torch.ones(2)}, tmp_path / "x.safetensors")
    source = SafetensorsSource([SafetensorsFile(tmp_path / "x.safetensors")])
    assert source.native_dtype() == expected
    source.close()


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "x.safetensors").symlink_to("blob")
    SafetensorsFile(tmp_path / "x.safetensors").close()


def test_reading_after_the_file_shrank(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="shrank"):
        file.read("a")
    file.close()


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(0, 8)}, b"1234", "truncated"),
        ({"a": entry(4, 0, shape=[1])}, b"", "truncated or damaged"),
        ({"a": entry(0, 1 << 70)}, b"1234", "truncated"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12, "overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"x" * 8, "overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12, "hole"),
        ({"a": entry(4, 8)}, b"x" * 8, "hole"),
        ({"a": entry(0, 4)}, b"x" * 8, "follow the last"),
        ({"a": entry(0, 8, shape=[3])}, b"x" * 8, "does not fit"),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, b"x" * 8, "does not fit"),
        ({"a": entry(0, 8, dtype="F16")}, b"x" * 8, "does not fit"),
        ({"a": entry(0, 8, shape=[10**4000, 10**4000])}, b"x" * 8, "does not fit"),
        ({"a": entry(0, 4, shape=[1, 1, 1, 1, 1])}, b"x" * 4, "at most 4 dims"),
        ({"a": entry(0, 4, shape=[-1])}, b"x" * 4, "whole number"),
        ({"a": entry(0, 4, shape=[1.0])}, b"x" * 4, "whole number"),
        ({"a": entry(0, 4, shape=[True])}, b"x" * 4, "whole number"),
        ({"a": entry(0, 4, shape="1")}, b"x" * 4, "whole number"),
        ({"a": {**entry(0, 4), "data_offsets": [0]}}, b"x" * 4, "two are needed"),
        ({"a": {**entry(0, 4), "data_offsets": [0.0, 4.0]}}, b"x" * 4, "two are needed"),
        ({"a": {**entry(0, 4), "more": 1}}, b"x" * 4, "exactly"),
        ({"a": {"dtype": "F32"}}, b"x" * 4, "exactly"),
        ({"a": [1, 2]}, b"", "exactly"),
        ([], b"", "not a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "not valid JSON.*twice"),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, data: bytes, match: str) -> None:
    refused(write(tmp_path / "x.safetensors", header, data), match)


@pytest.mark.parametrize("dtype", ["F7", "", 3, None, ["F32"]])
def test_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    path = write(tmp_path / "x.safetensors", {"a": {**entry(0, 4), "dtype": dtype}}, b"x" * 4)
    refused(path, "unknown dtype", UnsupportedModelError)


def test_integers_are_not_taken_for_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4, dtype=torch.int64), "b": torch.ones(4, dtype=torch.bool)}
    save_file(tensors, tmp_path / "x.safetensors")
    source = SafetensorsSource([SafetensorsFile(tmp_path / "x.safetensors")])
    with pytest.raises(UnsupportedModelError, match=r"'a' has dtype I64.*quantization_config"):
        source.read("a", torch.float32)
    assert source.read_stored("a").tolist() == [1, 1, 1, 1]
    with pytest.raises(UnsupportedModelError, match="'b' has dtype BOOL"):
        source.read_stored("b")
    source.close()


@pytest.mark.parametrize("size", [0, 3, 8])
def test_short_file(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x07" * size)
    refused(tmp_path / "x.safetensors", "truncated")


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.safetensors", {}, length=2**63), "header would take")


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {}, length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # sparse: takes no space
    refused(path, "at most")


def test_directory_and_pipe_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "folder.safetensors", "not a regular file")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    refused(tmp_path / "absent.safetensors", "No such file")


def test_one_name_in_two_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    files = [SafetensorsFile(tmp_path / name) for name in ("x", "y")]
    with pytest.raises(CheckpointError, match="both"):
        SafetensorsSource(files)


def test_fingerprint_sees_content_and_names(tmp_path: Path) -> None:
    def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "x.safetensors")
        source = SafetensorsSource([SafetensorsFile(tmp_path / "x.safetensors")])
        found = source.fingerprint()
        source.close()
        return found

    base = {"a": torch.zeros(64, 64)}
    changed = torch.zeros(64, 64)
    changed[0, 5] = 1.0
    assert fingerprint(base) == fingerprint(base)
    assert len({fingerprint(t) for t in (base, {"b": base["a"]}, {"a": changed})}) == 3


HEADER = json.dumps({"a": entry(0, 8), "b": entry(8, 24, "F16", [2, 4])}).encode()


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_any_damage_gives_a_checkpoint_error(chance: random.Random, edits: int) -> None:
    blob = bytearray(HEADER)
    for _ in range(edits):
        where = chance.randrange(len(blob))
        action = chance.randrange(3)
        if action == 0:
            blob[where] = chance.randrange(256)
        elif action == 1:
            del blob[where]
        else:
            blob[where:where] = chance.choice([b"9", b"-", b"[", b'"', b"null", b"1e999"])
    try:
        entries = parse_header(bytes(blob), 8 + len(blob) + 24, "x")
    except CheckpointError:
        return
    assert sum(e.size_bytes for e in entries.values()) == 24
