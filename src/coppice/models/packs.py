"""Packed matrices of models, kept between starts.

The first start of a model packs its matrices and writes them down; later ones map the file
and read nothing of the checkpoint but its small tensors. A file that is missing, damaged or
of another version is made anew, with a warning where it was damaged; a folder that cannot be
written costs the saving only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from coppice.weights import Format, Linear
from coppice.weights.pack import DamagedPackError, PackWriter, read_pack

VERSION = 1
"""Changes with any layout of the kernels; part of every key."""

_log = logging.getLogger(__name__)


class Packs:
    """Where a loader finds packed matrices and leaves new ones; by default nowhere."""

    def __init__(
        self, found: Mapping[str, Tensor] | None = None, writer: PackWriter | None = None
    ) -> None:
        self._found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in ({} if found is None else found).items():
            layer, _, role = key.rpartition("/")
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
def open_packs(folder: Path | None, *parts: object) -> Iterator[Packs]:
    """The packs of one model, found or about to be written.

    Args:
        folder: the cache folder; None keeps nothing.
        parts: what the packed form depends on, as JSON values.
    """
    if folder is None:
        yield Packs()
        return
    text = json.dumps([VERSION, *parts], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    path = folder / "packs" / f"{key[:32]}.pack"
    try:
        found = read_pack(path, key)
    except FileNotFoundError:
        pass
    except (DamagedPackError, OSError, ValueError, KeyError) as error:
        _log.warning("The packed weights in %s are made anew: %s.", path, error)
    else:
        yield Packs(found)
        return
    try:
        writer = PackWriter(path, key)
    except OSError as error:
        _log.warning("Packed weights are not kept: %s", error)
        yield Packs()
        return
    with writer:
        yield Packs(writer=writer)
