"""Packed weights in one file: written once, then read into memory by every later start.

The file (see `coppice.weights.stored`) is written under another name and renamed when whole,
so a reader sees a complete file or none. Whatever is wrong with a file it is worth no more
than no file: the weights can be packed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from coppice.weights.stored import MAGIC, TRAILER, StoredPack, checksums

_log = logging.getLogger(__name__)

ALIGN = 4096
"""Tensors start on multiples of it, so any vector load is aligned."""

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
            "bytes": len(data),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "checksums": checksums(data),
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
                self._file.write(TRAILER.pack(MAGIC, len(text), hashlib.sha256(text).digest()))
                self._file.close()
                self._partial.replace(self._path)
        except OSError as error:  # a full disk: what was packed stays in use, unkept
            _log.warning("Packed weights are not kept: %s", error)
        finally:
            self.abandon()


def tensors_of(pack: StoredPack) -> Mapping[str, Tensor]:
    """The tensors of a pack; they keep its memory alive."""
    return {name: _tensor(pack, entry) for name, entry in pack.tensors.items()}


def _tensor(pack: StoredPack, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    if shape.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(pack.memory, dtype=dtype, count=shape.numel(), offset=entry["at"])
    return flat.view(shape)
