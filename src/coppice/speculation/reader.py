"""The small model's side of a tree: what it has read of a sequence, and one pass over nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coppice.cache import PageAllocator
from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.models.kv import KVLayout
from coppice.speculation.tree import ROOT, DraftTree

PREFILL_ROWS = 512
"""Rows of a prompt the draft reads in one pass."""


class DraftDecoder(Protocol):
    """What is needed of the small model."""

    def forward(self, rows: Rows, pool: KVPool) -> Tensor:
        """Logits ``[W, V]`` of the wanted rows."""
        ...

    def kv_layout(self, page_size: int) -> KVLayout:
        """Shapes of its KV pages."""
        ...


@dataclass(slots=True)
class Reader:
    """How far the draft has read a sequence: ``tokens`` have KV in ``pages``, in order.

    While a tree grows, ``base`` is the committed length; ``chain`` are the nodes read so far
    of the path of first children, whose KV stands behind the committed tokens' own. If that
    path is accepted nothing of it is read again.
    """

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    base: int = 0
    chain: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Piece:
    """Rows of one sequence in a pass: tokens, positions, slots, parents within the piece."""

    reader: Reader
    tokens: list[int]
    positions: list[int]
    slots: list[int]
    parents: list[int]
    wanted: list[int]
    prefix: int


class DraftReader:
    """Runs the small model over committed tokens and tree nodes of many sequences.

    Args:
        decoder: the small model.
        num_pages: KV pages it may hold.
        page_size: tokens a page.
    """

    def __init__(self, decoder: DraftDecoder, *, num_pages: int, page_size: int) -> None:
        self._decoder = decoder
        self._page_size = page_size
        self._pool = KVPool(decoder.kv_layout(page_size), num_pages)
        self._allocator = PageAllocator(num_pages)
        self._readers: dict[int, Reader] = {}

    def catch_up(self, arrival: int, tokens: list[int], slots: int) -> Reader | None:
        """Read a sequence up to a last piece, which the tree's first pass takes along.

        Args:
            arrival: the sequence.
            tokens: its committed tokens.
            slots: levels of the tree, and rows of a pass beyond them.

        Returns:
            None when there are no pages for it.
        """
        reader = self._readers.setdefault(arrival, Reader())
        same = _common(reader.tokens, tokens, at_most=len(tokens) - 1)
        del reader.tokens[same:]
        reader.base = len(tokens)
        reader.chain = []
        missing = -(-(len(tokens) + slots) // self._page_size) - len(reader.pages)
        if missing > self._allocator.num_free:
            return None
        reader.pages.extend(self._allocator.alloc() for _ in range(missing))
        while len(tokens) - len(reader.tokens) > PREFILL_ROWS:
            at = len(reader.tokens)
            self._run([_text(reader, tokens[at : at + PREFILL_ROWS])])
            reader.tokens.extend(tokens[at : at + PREFILL_ROWS])
        return reader

    def read(self, work: Sequence[tuple[Reader, list[int], DraftTree, list[int]]]) -> Tensor:
        """Logits after some nodes of some trees, in order, ``[W, V]``.

        Args:
            work: a sequence's reader, committed tokens, tree and the nodes wanted; `ROOT`
                alone in the first pass, which reads what is left of the committed tokens.
        """
        pieces = []
        for reader, tokens, tree, nodes in work:
            if nodes == [ROOT]:
                pieces.append(_text(reader, tokens[len(reader.tokens) :]))
            else:
                pieces.append(_branches(reader, tree, nodes))
        logits = self._run(pieces)
        for reader, tokens, _, nodes in work:
            if nodes == [ROOT]:
                reader.tokens = list(tokens)
        return logits

    def forget(self, arrival: int) -> None:
        """Give a sequence's pages back; unknown numbers are no error."""
        reader = self._readers.pop(arrival, None)
        for page in () if reader is None else reader.pages:
            self._allocator.release(page)

    def _run(self, pieces: Sequence[_Piece]) -> Tensor:
        """One pass of the model."""
        counts = [len(piece.tokens) for piece in pieces]
        starts = np.cumsum([0, *counts])
        fields: NDArray[np.int32] = np.empty((6, int(starts[-1])), np.int32)
        fields[5] = -1  # no adapters
        wanted: list[int] = []
        table = np.full((len(pieces), max(len(p.reader.pages) for p in pieces)), -1, np.int32)
        for s, piece in enumerate(pieces):
            a, b = int(starts[s]), int(starts[s + 1])
            fields[0, a:b] = piece.tokens
            fields[1, a:b] = piece.positions
            fields[2, a:b] = s
            fields[3, a:b] = [p if p < 0 else p + a for p in piece.parents]
            fields[4, a:b] = piece.slots
            wanted.extend(a + i for i in piece.wanted)
            table[s, : len(piece.reader.pages)] = piece.reader.pages
        token, position, owner, parent, slot, adapter = torch.from_numpy(fields)
        rows = Rows(
            token=token,
            position=position,
            sequence=owner,
            parent=parent,
            slot=slot,
            adapter=adapter,
            logit_rows=torch.tensor(wanted, dtype=torch.int32),
            page_table=torch.from_numpy(table),
            prefix_len=torch.tensor([p.prefix for p in pieces], dtype=torch.int32),
        )
        return self._decoder.forward(rows, self._pool)


def _text(reader: Reader, tokens: list[int]) -> _Piece:
    """The next committed tokens as one chunk; the last one's logits are wanted."""
    start, count = len(reader.tokens), len(tokens)
    places = list(range(start, start + count))
    parents = list(range(-1, count - 1))
    return _Piece(reader, tokens, places, places, parents, [count - 1], start)


def _branches(reader: Reader, tree: DraftTree, nodes: list[int]) -> _Piece:
    """Wanted nodes and those of their ancestors that not all of them share.

    An attending row sees the sequence's first slots and its ancestors in the same pass, so
    branches are read again from where they leave the chain of first children. That chain's KV
    is in order behind the committed tokens and is seen as part of the beginning.
    """
    paths = [_path(tree, node) for node in nodes]
    chain = reader.chain
    shared = 0  # nodes of the chain that every wanted node stands behind
    while shared < len(chain) and all(
        len(path) > shared + 1 and path[shared] == chain[shared] for path in paths
    ):
        shared += 1
    rows = sorted({node for path in paths for node in path[shared:]})
    place = {node: i for i, node in enumerate(rows)}
    depth = {node: d for path in paths for d, node in enumerate(path)}
    if len(chain) == shared:  # the chain may go on in this pass
        first = _first_child(tree, chain[-1] if chain else ROOT)
        if first in place:
            chain.append(first)
            reader.tokens.append(tree.tokens[first])
    on_chain = set(chain)
    beyond = reader.base + 1 + max(depth.values())  # where no chain of this pass reaches
    return _Piece(
        reader,
        [tree.tokens[node] for node in rows],
        [reader.base + depth[node] for node in rows],
        [reader.base + depth[n] if n in on_chain else beyond + place[n] for n in rows],
        [place.get(tree.parents[node], -1) for node in rows],
        [place[node] for node in nodes],
        reader.base + shared,
    )


def _path(tree: DraftTree, node: int) -> list[int]:
    """The nodes from below the root to ``node``."""
    path = []
    while node != ROOT:
        path.append(node)
        node = tree.parents[node]
    return path[::-1]


def _first_child(tree: DraftTree, node: int) -> int:
    """The first child of a node, or `ROOT` when it has none."""
    return next((i for i in range(node + 1, len(tree)) if tree.parents[i] == node), ROOT)


def _common(a: list[int], b: list[int], at_most: int) -> int:
    """Length of the common beginning of two lists, at most so much."""
    limit = min(len(a), len(b), at_most)
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
