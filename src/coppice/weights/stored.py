"""A pack file brought into memory and checked: the part of packs that needs no PyTorch.

The file is data first, every tensor on a page boundary, then a JSON index, then a trailer of
fixed size. It is copied into huge pages rather than mapped: page walks over small pages cost
decoding a quarter of its bandwidth, copying costs a start a tenth of a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coppice.kernels import native_available, usable_cores

TRAILER = struct.Struct("<8sQ32s")
"""Magic, bytes of the index, SHA-256 of the index."""
MAGIC = b"coppack2"
PIECE_BYTES = 4 << 20
"""What is read and checked at a time, while it is still in a core's cache."""


class DamagedPackError(Exception):
    """A pack file is truncated, altered, of another version or of something else."""


@dataclass(frozen=True, slots=True)
class StoredPack:
    """A whole pack, checked.

    Attributes:
        path: where it came from.
        key: what it is of.
        memory: the data, private to this process.
        tensors: per name ``at`` (bytes into ``memory``), ``dtype`` and ``shape``.
    """

    path: Path
    key: str
    memory: mmap.mmap
    tensors: Mapping[str, Mapping[str, Any]]


def load_pack(path: Path, key: str) -> StoredPack:
    """Read a pack and check every byte of it that counts.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedPackError: it is not a whole pack of ``key``.
    """
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # a folder of another user
            os.utime(file.fileno())  # the least recently used are the first to be evicted
        end, index = _read_index(file.fileno())
        if index["key"] != key:
            raise DamagedPackError("it belongs to another model or version")
        memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(memory) as view:
            _fill(file.fileno(), view, list(_pieces(index["tensors"], end)))
    return StoredPack(path, key, memory, index["tensors"])


def checksum(data: memoryview) -> str:
    """A digest that changes with any byte."""
    if not native_available():
        return hashlib.sha256(data).hexdigest()
    from coppice.kernels import _native

    return f"{_native.checksum(data):016x}"


def checksums(data: memoryview) -> list[str]:
    """The digests of a tensor's bytes, piece by piece."""
    return [checksum(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]


def _read_index(file: int) -> tuple[int, dict[str, Any]]:
    size = os.fstat(file).st_size
    if size < TRAILER.size:
        raise DamagedPackError("it is too short")
    magic, length, digest = TRAILER.unpack(os.pread(file, TRAILER.size, size - TRAILER.size))
    end = size - TRAILER.size - length
    if magic != MAGIC or end < 0:
        raise DamagedPackError("its end is missing")
    text = os.pread(file, length, end)
    if hashlib.sha256(text).digest() != digest:
        raise DamagedPackError("its index is damaged")
    index: dict[str, Any] = json.loads(text)
    return end, index


def _pieces(tensors: Mapping[str, Mapping[str, Any]], end: int) -> Iterator[tuple[int, int, str]]:
    """First byte, size and digest of every piece."""
    for name, entry in tensors.items():
        stop = entry["at"] + entry["bytes"]
        if stop > end:
            raise DamagedPackError(f"the data of {name} are missing")
        for at, digest in zip(
            range(entry["at"], stop, PIECE_BYTES), entry["checksums"], strict=True
        ):
            yield at, min(PIECE_BYTES, stop - at), digest


def _fill(file: int, view: memoryview, pieces: list[tuple[int, int, str]]) -> None:
    def fill(piece: tuple[int, int, str]) -> None:
        at, size, digest = piece
        part, done = view[at : at + size], 0
        while done < size:  # reading and hashing let go of the interpreter
            read = os.preadv(file, [part[done:]], at + done)
            if read == 0:
                raise DamagedPackError("it ends too early")
            done += read
        if checksum(part) != digest:
            raise DamagedPackError("its data are damaged")

    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(fill, pieces):
            pass
