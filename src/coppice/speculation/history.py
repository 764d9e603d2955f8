"""What was answered before, by scope: bounded, and kept on disk where that is wanted.

A scope is a tenant and its cache salt, as for shared prefixes: a proposal drawn from another
tenant's answers would leak them through its timing. Scopes share one memory bound; the least
recently used one makes room, and one alone may take half of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from coppice.kernels.suffix import BYTES_PER_TOKEN, SuffixIndex, make_index

_log = logging.getLogger(__name__)

_HEAD = struct.Struct("<8s16sQI")
"""Magic, fingerprint of vocabulary and scope, number of tokens, CRC-32 of their bytes."""
_MAGIC = b"COPHIST1"
MOST_SCOPES = 256
"""Scopes held at the same time; each takes a few kilobytes even when nearly empty."""


class History:
    """Suffix indexes of finished answers.

    Args:
        bound_bytes: most memory of all scopes together.
        folder: where scopes are kept between starts; None keeps nothing.
        vocabulary: fingerprint of the tokenizer; token ids of another mean nothing here.
    """

    def __init__(
        self, bound_bytes: int, *, folder: Path | None = None, vocabulary: str = ""
    ) -> None:
        self._bound_bytes = bound_bytes
        self._most_tokens = bound_bytes // 2 // BYTES_PER_TOKEN
        self._folder = folder
        self._vocabulary = vocabulary
        self._scopes: OrderedDict[str, SuffixIndex] = OrderedDict()
        self._changed: set[str] = set()
        self.evicted = 0
        """Scopes that made room for others."""

    @property
    def size_bytes(self) -> int:
        """Memory of all scopes."""
        return sum(index.size_bytes for index in self._scopes.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all scopes."""
        return sum(map(len, self._scopes.values()))

    def of(self, scope: str) -> SuffixIndex | None:
        """A scope's index, read from disk the first time; None where there is none."""
        index = self._scopes.get(scope)
        if index is not None:
            self._scopes.move_to_end(scope)
            return index
        found = self._read(scope)
        if found:
            self._add(scope, found)
        return self._scopes.get(scope)

    def add(self, scope: str, text: Sequence[int]) -> None:
        """Remember a text of a scope, then make room."""
        if self.of(scope) is None:
            self._scopes[scope] = make_index(self._most_tokens)
        self._add(scope, text)
        self._changed.add(scope)

    def save(self) -> None:
        """Write what changed; a folder that cannot be written costs a warning."""
        for scope in sorted(self._changed & self._scopes.keys()):
            self._write(scope)
        self._changed.clear()

    def _add(self, scope: str, text: Sequence[int]) -> None:
        index = self._scopes.setdefault(scope, make_index(self._most_tokens))
        self._scopes.move_to_end(scope)
        index.end_text()
        index.extend(text)
        while len(self._scopes) > 1 and (
            len(self._scopes) > MOST_SCOPES or self.size_bytes > self._bound_bytes
        ):
            oldest = next(iter(self._scopes))
            if oldest in self._changed:
                self._write(oldest)
                self._changed.discard(oldest)
            del self._scopes[oldest]
            self.evicted += 1

    # -- on disk ---------------------------------------------------------------------------

    def _path(self, scope: str) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{self._mark(scope).hex()}.history"

    def _mark(self, scope: str) -> bytes:
        return hashlib.sha256(f"{self._vocabulary}\n{scope}".encode()).digest()[:16]

    def _read(self, scope: str) -> list[int]:
        """The kept texts; none, with a warning, where the file is damaged."""
        path = self._path(scope)
        if path is None or not path.exists():
            return []
        try:
            data = path.read_bytes()
            magic, mark, count, checksum = _HEAD.unpack_from(data)
            body = data[_HEAD.size :]
        except (OSError, struct.error) as error:
            _log.warning("%s cannot be read (%s): this history starts empty.", path, error)
            return []
        whole = len(body) == 4 * count and zlib.crc32(body) == checksum
        if magic != _MAGIC or mark != self._mark(scope) or not whole:
            _log.warning("%s is damaged: this history starts empty; it may be removed.", path)
            return []
        tokens = array("i", body)
        if sys.byteorder == "big":
            tokens.byteswap()
        return tokens.tolist()

    def _write(self, scope: str) -> None:
        """Whole or not at all; readable by this user only, since it holds what people wrote."""
        path = self._path(scope)
        if path is None:
            return
        tokens = array("i", self._scopes[scope].tokens())
        if sys.byteorder == "big":
            tokens.byteswap()
        body = tokens.tobytes()
        head = _HEAD.pack(_MAGIC, self._mark(scope), len(tokens), zlib.crc32(body))
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(head + body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            _log.warning("The history could not be kept in %s: %s", path, error)
