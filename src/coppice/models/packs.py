"""Packed matrices of models, kept between starts.

The first start of a model packs its matrices and writes them down; later ones read the file
and nothing of the checkpoint but its small tensors. A file that is missing, damaged or
of another version is made anew, with a warning where it was damaged; a folder that cannot be
written costs the saving only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from coppice.weights import Format, Linear
from coppice.weights.pack import PackWriter, tensors_of
from coppice.weights.stored import DamagedPackError, StoredPack, load_pack

VERSION = 2
"""Changes with any layout of the kernels; part of every key."""

_log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """Where packs are kept.

    Attributes:
        folder: the cache folder.
        early: a pack that is being read already, on the guess that it will be wanted.
        most_bytes: packs of other models go when all are larger, least recently used first.
    """

    folder: Path
    early: Future[StoredPack] | None = None
    most_bytes: int = 1 << 62


class Packs:
    """Where a loader finds packed matrices and leaves new ones; by default nowhere."""

    def __init__(
        self,
        found: Mapping[str, Tensor] | None = None,
        writer: PackWriter | None = None,
        *,
        path: Path | None = None,
        key: str = "",
    ) -> None:
        self.path = path
        self.key = key
        self._found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in ({} if found is None else found).items():
            layer, _, role = name.rpartition("/")
            self._found.setdefault(layer, {})[role] = tensor
        self._writer = writer
        self.complete = found is not None
        """Whether every matrix of the model is there."""

    def find(self, name: str, format: Format) -> dict[str, Tensor] | None:
        """The kept tensors of a matrix, by role."""
        return self._found.get(f"{name}/{format.name}")

    def keep(self, name: str, linear: Linear) -> None:
        """Write a new matrix down."""
        if self._writer is None:
            return
        try:
            for role, tensor in linear.tensors.items():
                self._writer.add(f"{name}/{linear.format.name}/{role}", tensor)
        except OSError as error:
            _log.warning("Packed weights are not kept: %s", error)
            self._writer.abandon()
            self._writer = None


@contextmanager
def open_packs(kept: Kept | None, *parts: object) -> Iterator[Packs]:
    """The packs of one model, found or about to be written.

    Args:
        kept: where packs are kept; None keeps nothing.
        parts: what the packed form depends on, as JSON values.
    """
    if kept is None:
        yield Packs()
        return
    text = json.dumps([VERSION, *parts], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = kept.folder / "packs" / f"{key[:32]}.pack"
    try:
        found = tensors_of(_early(kept.early, path, key) or load_pack(path, key))
    except FileNotFoundError:
        pass
    except (DamagedPackError, OSError, ValueError, KeyError) as error:
        _log.warning("The packed weights in %s are made anew: %s.", path, error)
    else:
        yield Packs(found, path=path, key=key)
        return
    try:
        writer = PackWriter(path, key)
    except OSError as error:
        _log.warning("Packed weights are not kept: %s", error)
        yield Packs()
        return
    with writer:
        yield Packs(writer=writer, path=path, key=key)
    _evict(path, kept.most_bytes)


def _evict(latest: Path, most_bytes: int) -> None:
    """Remove the least recently used packs beside ``latest`` until all fit.

    A pack that another process is reading just now goes on existing for that process; one
    that was read is not needed any more.
    """
    try:
        found = [(p.stat(), p) for p in latest.parent.glob("*.pack")]
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if total > most_bytes and path != latest:
                path.unlink(missing_ok=True)
                total -= stat.st_size
    except OSError as error:
        _log.warning("Old packed weights could not be removed: %s", error)


def _early(early: Future[StoredPack] | None, path: Path, key: str) -> StoredPack | None:
    """What was read early, if it is what is wanted and whole."""
    if early is None:
        return None
    try:
        pack = early.result()
    except (DamagedPackError, OSError, ValueError, KeyError):
        return None  # reading it again finds the reason
    return pack if (pack.path, pack.key) == (path, key) else None
