"""What a page is called outside the pool: a keyed hash of every token up to its end.

A page's K and V depend on all tokens before it, so its name does too: each mark is made of the
parent's mark and the page's own tokens, the first of the scope and of what computed them. The
key is secret, so nobody can look for tokens whose page passes for another's (CVE-2025-25183 of
vLLM); whoever reads a page compares its tokens besides.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

MARK_BYTES = 16
SECRET_BYTES = 32


class PageKey(NamedTuple):
    """One full page: its mark, the mark of the page before it, and its tokens."""

    mark: bytes
    parent: bytes
    tokens: tuple[int, ...]


class Marks:
    """Makes marks.

    Args:
        secret: key of the hash, `SECRET_BYTES` bytes.
        namespace: whatever K and V depend on besides tokens: model, formats, kernels.
    """

    def __init__(self, secret: bytes, namespace: bytes) -> None:
        self._secret = secret
        self._namespace = namespace

    def root(self, scope: str) -> bytes:
        """What the first page of a scope (tenant and salt) has for a parent."""
        hashed = blake2b(self._namespace, digest_size=MARK_BYTES, key=self._secret, person=b"root")
        hashed.update(len(self._namespace).to_bytes(8, "little") + scope.encode())
        return hashed.digest()

    def child(self, parent: bytes, tokens: Sequence[int]) -> PageKey:
        """The key of the page with these tokens after ``parent``."""
        data = parent + struct.pack(f"<{len(tokens)}i", *tokens)
        mark = blake2b(data, digest_size=MARK_BYTES, key=self._secret, person=b"page").digest()
        return PageKey(mark, parent, tuple(tokens))
