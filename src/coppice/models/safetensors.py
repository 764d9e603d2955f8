"""Reading of safetensors files, with the header treated as hostile.

A file is an 8-byte little-endian length, a JSON header of that length, and one byte buffer
the header's tensors tile exactly. Nothing here executes what it reads, and no size from the
file is used before it was checked against the file's real size. Tensors are read into fresh
memory rather than mapped: a file truncated under a map kills the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.kernels.formats import Format
from coppice.models.fields import short
from coppice.models.source import Codes

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1_000_000
MAX_RANK = 4

_LENGTH_BYTES = 8
_SAMPLE_BYTES = 4096
_BITS: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
}
_FLOATS: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_TORCH: dict[str, torch.dtype] = {
    **_FLOATS,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class TensorEntry(NamedTuple):
    """One tensor of a file: where its bytes lie (absolute offset) and what they mean."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def parse_header(blob: bytes, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """Parse and check a header.

    Args:
        blob: the header's JSON.
        file_bytes: size of the whole file.
        where: file name for messages.

    Raises:
        CheckpointError: anything that does not add up, naming the tensor.
    """
    try:
        header = json.loads(blob, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header is not valid JSON ({error}).") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the header is not a JSON object.")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(header)} tensors; at most {MAX_TENSORS} are read.")
    start = _LENGTH_BYTES + len(blob)
    entries = {
        name: _entry(f"{where}: tensor {short(name)}", fields, start, file_bytes)
        for name, fields in header.items()
    }
    _check_tiling(entries, start, file_bytes, where)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _entry(where: str, fields: Any, start: int, file_bytes: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs exactly 'dtype', 'shape' and 'data_offsets'.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UnsupportedModelError(f"{where} has unknown dtype {short(dtype)}.")
    if not _whole(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where} has shape {short(shape)}; at most {MAX_RANK} dims, each a whole number."
        )
    if not _whole(offsets) or len(offsets) != 2:  # noqa: PLR2004
        raise CheckpointError(f"{where} has data_offsets {short(offsets)}; two are needed.")
    begin, end = offsets
    if not begin <= end <= file_bytes - start:
        raise CheckpointError(
            f"{where} spans bytes {short(begin)} to {short(end)} of "
            f"{max(file_bytes - start, 0)}; the file is truncated or damaged: download it again."
        )
    needed = math.prod(shape) * (_BITS[dtype] // 8)
    if end - begin != needed:
        raise CheckpointError(
            f"{where} of shape {short(shape)} and dtype {dtype} does not fit the "
            f"{end - begin} bytes it spans."
        )
    return TensorEntry(dtype, tuple(shape), start + begin, end - begin)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_tiling(entries: dict[str, TensorEntry], start: int, file_bytes: int, where: str) -> None:
    """Tensors lie end to end: no overlap, no hole, nothing after the last."""
    reached, last = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1][3])):
        if entry.offset != reached:
            verb = "overlaps" if entry.offset < reached else "leaves a hole after"
            raise CheckpointError(f"{where}: tensor {short(name)} {verb} {short(last)}.")
        reached, last = entry.offset + entry.size_bytes, name
    if reached != file_bytes:
        raise CheckpointError(f"{where}: {file_bytes - reached} bytes follow the last tensor.")


class SafetensorsFile:
    """One open file.

    Args:
        path: the file; a symbolic link is followed (hub caches are made of them).

    Raises:
        CheckpointError: it cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file.")
            self._size = status.st_size
            self._header = self._read_header()
            self.entries = parse_header(self._header, self._size, self.name)
        except OSError as error:
            self.close()
            raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from None
        except CheckpointError:
            self.close()
            raise

    def _read_header(self) -> bytes:
        length = int.from_bytes(os.pread(self._fd, _LENGTH_BYTES, 0), "little")
        if self._size < _LENGTH_BYTES or length > self._size - _LENGTH_BYTES:
            raise CheckpointError(
                f"{self.name}: the header would take {length} bytes but the file has "
                f"{self._size}; it is truncated or no safetensors file: download it again."
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.name}: the header takes {length} bytes; at most {MAX_HEADER_BYTES} "
                "are read."
            )
        return os.pread(self._fd, length, _LENGTH_BYTES)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in fresh memory.

        Raises:
            UnsupportedModelError: a dtype that no supported checkpoint uses.
            CheckpointError: the file shrank since it was opened.
        """
        entry = self.entries[name]
        dtype = _TORCH.get(entry.dtype)
        if dtype is None:
            raise UnsupportedModelError(
                f"{self.name}: tensor {short(name)} has dtype {entry.dtype}; supported are "
                f"{', '.join(_TORCH)}."
            )
        out = torch.empty(entry.shape, dtype=dtype)
        if entry.size_bytes:
            raw = out.reshape(-1).view(torch.uint8).numpy()
            self._read_into(memoryview(raw.data), entry.offset)
        return out

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"Cannot read {self.name}: {error.strerror}.") from None
            if count == 0:
                raise CheckpointError(f"{self.name} shrank while it was read; load it again.")
            done += count

    def sample(self, digest: hashlib._Hash) -> None:
        """Add the header and the first, middle and last bytes of each tensor to ``digest``."""
        digest.update(self._size.to_bytes(8, "little") + self._header)
        for entry in self.entries.values():
            last = max(entry.size_bytes - _SAMPLE_BYTES, 0)
            for place in (0, last // 2, last):
                count = min(_SAMPLE_BYTES, entry.size_bytes)
                digest.update(os.pread(self._fd, count, entry.offset + place))

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SafetensorsSource:
    """The tensors of one or more safetensors files (see `coppice.models.source`).

    Args:
        files: the open files; closed with the source.
    """

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self._files = files
        self._home: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.entries:
                if name in self._home:
                    other = self._home[name].name
                    raise CheckpointError(
                        f"Tensor {short(name)} is in both {other} and {file.name}."
                    )
                self._home[name] = file
        self.format = f"safetensors/{str(self.native_dtype()).removeprefix('torch.')}"

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._home.keys()

    def homes(self) -> dict[str, str]:
        """Which file each tensor is in."""
        return {name: file.name for name, file in self._home.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``."""
        return self._home[name].entries[name].shape

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def stored_kind(self, name: str) -> str:
        """The type ``name`` is stored as, in the file's words: ``"BF16"``, ``"I32"``."""
        return self._home[name].entries[name].dtype

    def read_stored(self, name: str) -> Tensor:
        """The tensor as it is stored, in fresh memory."""
        return self._home[name].read(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``, in fresh memory.

        Raises:
            UnsupportedModelError: it is not stored as floats.
        """
        kind = self.stored_kind(name)
        if kind not in _FLOATS:
            raise UnsupportedModelError(
                f"Tensor {short(name)} has dtype {kind}; supported are F32, F16 and BF16, and "
                "integers where config.json describes them in 'quantization_config'."
            )
        return self.read_stored(name).to(dtype)

    def stored_format(self, name: str) -> Format | None:
        """None: plain files hold floats (see `coppice.models.quantized`)."""
        return None

    def read_codes(self, name: str) -> Codes:
        """Never called, since no tensor has a stored format."""
        raise KeyError(name)

    def release(self, name: str) -> None:
        """Nothing to do: a read tensor lives in the caller's memory alone."""

    def native_dtype(self, names: Iterable[str] | None = None) -> torch.dtype:
        """bfloat16 if all matrices are stored so, else float32 (float16 does not fit bfloat16).

        Args:
            names: the tensors that count; all by default.
        """
        wanted = self.names() if names is None else names
        kinds = {self.stored_kind(name) for name in wanted if len(self.shape(name)) > 1}
        return torch.bfloat16 if kinds == {"BF16"} else torch.float32

    def fingerprint(self) -> str:
        """SHA-256 over headers and sampled content."""
        digest = hashlib.sha256()
        for file in sorted(self._files, key=lambda f: f.name):
            file.sample(digest)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
