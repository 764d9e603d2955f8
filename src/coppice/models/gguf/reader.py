"""The GGUF container: header, metadata and tensor table, checked before anything is used.

Every size in the file is attacker-controlled, so all arithmetic is in Python's unbounded
integers and every span is checked against the file before it is touched. The file is
memory-mapped; string arrays and tensors are views that cost nothing until they are read.

Source: the GGUF specification, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.gguf.quants import TYPES, Quant

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 65_536
MAX_KEY_BYTES = 65_535
MAX_TEXT_BYTES = 16 << 20
MAX_ARRAY = 16 << 20
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_Entry = tuple[str, tuple[int, ...], Quant, int]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
        shape: row-major, the outermost dimension first (GGUF stores the reverse).
        kind: how elements are stored, such as ``"Q4_K"``.
        start: byte offset in the file.
        num_bytes: stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int


class StringArray:
    """An array of strings inside the file, decoded on demand.

    Args:
        data: the whole file.
        start: offset of the first length field.
        count: number of strings, already walked over and found inside the file.
    """

    def __init__(self, data: memoryview, start: int, count: int) -> None:
        self._data = data
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return self._count

    def decode(self) -> list[str]:
        """All strings.

        Raises:
            CheckpointError: one is not UTF-8.
        """
        found, at, data = [], self._start, self._data
        for _ in range(self._count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            found.append(_utf8(data[at : at + length], "a string in an array"))
            at += length
        return found


class GGUFReader:
    """An opened GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a GGUF file, truncated, contradictory or beyond the caps.
        UnsupportedModelError: a version, byte order or tensor type that is not read here.

    Attributes:
        metadata: keys to numbers, booleans, strings, numpy arrays or `StringArray`.
        tensors: the tensor table by name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = _open_map(self.path)
        self._data = memoryview(self._map)
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def tensor_bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, a read-only view ``[num_bytes]`` of the file."""
        if self._map.closed:
            raise CheckpointError(f"{self.path.name} was closed; open it again to read tensors.")
        return np.frombuffer(self._map, np.uint8, info.num_bytes, info.start)

    def release(self, info: TensorInfo) -> None:
        """Tell the system that a tensor's pages are no longer needed."""
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.start + info.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and not self._map.closed:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Unmap the file, as soon as no view of it is alive."""
        try:
            self._data.release()
            self._map.close()
        except BufferError:  # numpy views of tensors are alive; the map goes with the last
            return

    def _read_header(self) -> None:
        if bytes(self._take(4, "the magic")) != MAGIC:
            raise CheckpointError(f"{self.path.name} is not a GGUF file (wrong first bytes).")
        version = self._number("I")
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{self.path.name} is GGUF version {version}; versions 2 and 3 (little-endian) "
                "are read. Convert it with a current tool."
            )
        num_tensors, num_keys = self._count("tensor"), self._count("metadata")
        for _ in range(num_keys):
            key = self._text("a metadata key", MAX_KEY_BYTES)
            if key in self.metadata:
                raise self._wrong(f"metadata key {key[:80]!r} appears twice")
            self.metadata[key] = self._value(self._number("I"), key, depth=0)
        alignment = self._alignment()
        table = [self._tensor_entry() for _ in range(num_tensors)]
        base = -(-self._at // alignment) * alignment
        for entry in table:
            self._place(entry, base, alignment)
        self._refuse_overlap()

    def _tensor_entry(self) -> _Entry:
        name = self._text("a tensor name", MAX_KEY_BYTES)
        rank = self._number("I")
        if not 1 <= rank <= MAX_RANK:
            raise self._wrong(f"tensor {name[:80]!r} has rank {rank}; 1 to {MAX_RANK} are valid")
        shape = tuple(reversed([self._number("Q") for _ in range(rank)]))
        code = self._number("I")
        if code not in TYPES:
            known = ", ".join(sorted(kind.name for kind in TYPES.values()))
            raise UnsupportedModelError(
                f"{self.path.name} stores {name[:80]!r} as GGML type {code}, which is not "
                f"supported; use a file in one of {known}."
            )
        return name, shape, TYPES[code], self._number("Q")

    def _place(self, entry: _Entry, base: int, alignment: int) -> None:
        """Add a tensor to the table after checking its span."""
        name, shape, quant, offset = entry
        if name in self.tensors:
            raise self._wrong(f"tensor {name[:80]!r} appears twice")
        if min(shape) < 1 or shape[-1] % quant.block:
            raise self._wrong(
                f"tensor {name[:80]!r} of type {quant.name} cannot have shape {shape}"
            )
        num_bytes = math.prod(shape) // quant.block * quant.block_bytes
        start = base + offset
        if offset % alignment or start + num_bytes > len(self._data):
            raise self._wrong(
                f"tensor {name[:80]!r} lies at offset {offset} with {num_bytes} bytes, outside "
                f"the file of {len(self._data)} bytes or off its alignment {alignment}"
            )
        self.tensors[name] = TensorInfo(name, shape, quant.name, start, num_bytes)

    def _refuse_overlap(self) -> None:
        end, last = 0, ""
        for info in sorted(self.tensors.values(), key=lambda info: info.start):
            if info.start < end:
                raise self._wrong(f"tensors {last[:80]!r} and {info.name[:80]!r} overlap")
            end, last = info.start + info.num_bytes, info.name

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        ok = isinstance(value, int) and 1 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0
        if isinstance(value, bool) or not ok:
            raise self._wrong(f"general.alignment is {value!r:.80}, not a small power of two")
        return int(value)

    def _value(self, code: int, key: str, depth: int) -> Any:
        if code in _SCALARS:
            return self._number(_SCALARS[code])
        if code == _STRING:
            return self._text(f"the value of {key[:80]!r}", MAX_TEXT_BYTES)
        if code == _ARRAY and depth == 0:
            return self._array(key)
        raise self._wrong(f"metadata key {key[:80]!r} has the unknown or nested type {code}")

    def _array(self, key: str) -> Any:
        code, count = self._number("I"), self._number("Q")
        if count > MAX_ARRAY:
            raise self._wrong(f"the array {key[:80]!r} has {count} entries, more than {MAX_ARRAY}")
        if code == _STRING:
            return self._strings(key, count)
        if code not in _SCALARS:
            raise self._wrong(f"the array {key[:80]!r} holds the unknown or nested type {code}")
        dtype = np.dtype(_SCALARS[code]).newbyteorder("<")
        raw = self._take(count * dtype.itemsize, f"the array {key[:80]!r}")
        return np.frombuffer(bytes(raw), dtype)

    def _strings(self, key: str, count: int) -> StringArray:
        start = self._at
        for _ in range(count):
            self._take(self._number("Q"), f"a string in {key[:80]!r}")
        return StringArray(self._data, start, count)

    def _count(self, what: str) -> int:
        count = int(self._number("Q"))
        if count > MAX_ENTRIES:
            raise self._wrong(f"it claims {count} {what} entries, more than {MAX_ENTRIES}")
        return count

    def _number(self, code: str) -> Any:
        raw = self._take(struct.calcsize("<" + code), "a number")
        return struct.unpack("<" + code, raw)[0]

    def _text(self, what: str, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            raise self._wrong(f"{what} claims {length} bytes, more than {limit}")
        return _utf8(self._take(length, what), what)

    def _take(self, size: int, what: str) -> memoryview:
        if size > len(self._data) - self._at:
            raise self._wrong(f"it ends inside {what}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _wrong(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is damaged: {fault}. Download it again.")


def _open_map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{path} cannot be opened ({error}); give a GGUF file.") from error


def _utf8(raw: memoryview, what: str) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"The GGUF file is damaged: {what[:200]} is not UTF-8.") from error
