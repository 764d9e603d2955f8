"""Packed weights in one file: written once, checked, memory-mapped after that.

The file is data first, every tensor on a page boundary, then a JSON index, then a trailer of
fixed size. It is written under another name and renamed when whole, so a reader sees a
complete file or none. Whatever is wrong with a file it is worth no more than no file: the
weights can be packed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

ALIGN = 4096
"""Tensors start on multiples of it: mapped pages, and any vector load is aligned."""

_TRAILER = struct.Struct("<8sQ32s")
_MAGIC = b"coppack1"
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.uint8)
}


class PackWriter:
    """Writes a pack; a context manager that leaves nothing behind when its body fails.

    Args:
        path: where the pack will lie; its folder is made.
        key: what the pack is of; a reader must ask for the same.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._index: dict[str, Any] = {"key": key, "tensors": {}}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = self._partial.open("wb")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a contiguous CPU tensor.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        self._file.write(b"\0" * (-self._file.tell() % ALIGN))
        data = tensor.view(-1).view(torch.uint8).numpy().data
        self._index["tensors"][name] = {
            "at": self._file.tell(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._file.write(data)

    def abandon(self) -> None:
        """Give up: no pack will be made."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._file.closed:
                text = json.dumps(self._index).encode()
                self._file.write(text)
                self._file.write(_TRAILER.pack(_MAGIC, len(text), hashlib.sha256(text).digest()))
                self._file.close()
                self._partial.replace(self._path)
        except OSError as error:  # a full disk: what was packed stays in use, unkept
            _log.warning("Packed weights are not kept: %s", error)
        finally:
            self.abandon()


class DamagedPackError(Exception):
    """A pack file is truncated, altered, of another version or of something else."""


def read_pack(path: Path, key: str) -> Mapping[str, Tensor]:
    """Map a pack and check every byte of it.

    The tensors lie in the page cache and are shared with other processes that map the file;
    a tensor that is written to becomes private to this process.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedPackError: it is not a whole pack of ``key``.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _TRAILER.size:
            raise DamagedPackError("it is too short")
        whole = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    magic, length, digest = _TRAILER.unpack_from(whole, size - _TRAILER.size)
    end = size - _TRAILER.size - length
    if magic != _MAGIC or end < 0:
        raise DamagedPackError("its end is missing")
    text = whole[end : end + length]
    if hashlib.sha256(text).digest() != digest:
        raise DamagedPackError("its index is damaged")
    index = json.loads(text)
    if index["key"] != key:
        raise DamagedPackError("it belongs to another model or version")
    view = memoryview(whole)

    def check(item: tuple[str, dict[str, Any]]) -> tuple[str, Tensor]:
        name, entry = item
        dtype, count = _DTYPES[entry["dtype"]], torch.Size(entry["shape"]).numel()
        begin, stop = entry["at"], entry["at"] + count * dtype.itemsize
        if hashlib.sha256(view[begin:stop]).hexdigest() != entry["sha256"]:
            raise DamagedPackError(f"the data of {name} are damaged")
        if count == 0:
            return name, torch.empty(entry["shape"], dtype=dtype)
        tensor = torch.frombuffer(whole, dtype=dtype, count=count, offset=begin)
        return name, tensor.view(entry["shape"])

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(pool.map(check, index["tensors"].items()))
