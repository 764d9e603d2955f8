"""A small model of the same vocabulary drafts; the request's own noise decides its tokens.

Drawing the draft with the noise that the target will use at the same position (Gumbel-max
coupling) makes the two agree as often as their distributions allow, at any temperature.
Leviathan et al., Fast Inference from Transformers via Speculative Decoding (ICML 2023) is
the method; the coupling replaces its rejection rule, so the path itself does not change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from coppice.cache import PageAllocator
from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.kernels.sampling import choose
from coppice.models.kv import KVLayout
from coppice.speculation.interfaces import DraftView
from coppice.speculation.tree import DraftTree

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
class _Reader:
    """How far the draft has read a sequence: ``tokens`` have KV in ``pages``."""

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class DraftModel:
    """Proposes chains by running a small decoder ahead of the target.

    Args:
        decoder: the small model.
        num_pages: KV pages it may hold; a sequence that finds none is not drafted for.
        page_size: tokens a page.
        max_context: positions the decoder knows.
    """

    name = "draft"

    def __init__(
        self, decoder: DraftDecoder, *, num_pages: int, page_size: int, max_context: int
    ) -> None:
        self._decoder = decoder
        self._page_size = page_size
        self._max_context = max_context
        self._pool = KVPool(decoder.kv_layout(page_size), num_pages)
        self._allocator = PageAllocator(num_pages)
        self._readers: dict[int, _Reader] = {}
        self.pass_s = 0.0
        """Seconds of a drafting pass, smoothed."""

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """See `Proposer`. One pass of the small model for each level of the deepest tree."""
        trees: list[DraftTree | None] = [None] * len(views)
        active: list[int] = []
        for i, view in enumerate(views):
            if limits[i] > 0 and self._read_up_to(view, limits[i]):
                trees[i] = DraftTree(self.name)
                active.append(i)
        pending = {
            i: views[i].tokens[len(self._readers[views[i].arrival].tokens) :] for i in active
        }
        while pending:
            began = time.perf_counter()
            logits = self._run([(views[i], pending[i]) for i in pending]).numpy()
            positions = np.array(
                [len(self._readers[views[i].arrival].tokens) for i in pending], np.int64
            )
            drawn = choose(logits, [views[i].row for i in pending], positions).tokens.tolist()
            following: dict[int, list[int]] = {}
            for i, token in zip(pending, drawn, strict=True):
                tree = trees[i]
                assert tree is not None
                if token < 0:
                    continue
                tree.add(token, len(tree) - 1)
                if len(tree) < limits[i]:
                    following[i] = [token]
            self.pass_s += 0.1 * (time.perf_counter() - began - self.pass_s)
            pending = following
        return [tree if tree is None or len(tree) else None for tree in trees]

    def forget(self, arrival: int) -> None:
        """See `Proposer`."""
        reader = self._readers.pop(arrival, None)
        for page in () if reader is None else reader.pages:
            self._allocator.release(page)

    def _read_up_to(self, view: DraftView, limit: int) -> bool:
        """Bring a reader to the committed tokens, all but a last piece that `propose` runs.

        Returns:
            False when there are no pages or positions for it.
        """
        tokens = view.tokens
        reader = self._readers.setdefault(view.arrival, _Reader())
        same = _common(reader.tokens, tokens, at_most=len(tokens) - 1)
        del reader.tokens[same:]
        if len(tokens) + limit > self._max_context:
            return False
        missing = -(-(len(tokens) + limit) // self._page_size) - len(reader.pages)
        if missing > self._allocator.num_free:
            return False
        reader.pages.extend(self._allocator.alloc() for _ in range(missing))
        while len(tokens) - len(reader.tokens) > PREFILL_ROWS:
            at = len(reader.tokens)
            self._run([(view, tokens[at : at + PREFILL_ROWS])])
        return True

    def _run(self, work: list[tuple[DraftView, list[int]]]) -> Tensor:
        """One pass over the next tokens of some sequences; logits of each one's last."""
        readers = [self._readers[view.arrival] for view, _ in work]
        counts = [len(tokens) for _, tokens in work]
        total = sum(counts)
        fields = np.empty((6, total), np.int32)
        token, position, owner, parent, slot, adapter = fields
        adapter[:] = -1
        parent[:] = np.arange(-1, total - 1)
        at = 0
        for s, (_, tokens) in enumerate(work):
            end, start = at + counts[s], len(readers[s].tokens)
            token[at:end] = tokens
            position[at:end] = slot[at:end] = range(start, start + counts[s])
            owner[at:end] = s
            parent[at] = -1
            at = end
        table = np.full((len(work), max(len(r.pages) for r in readers)), -1, np.int32)
        for s, reader in enumerate(readers):
            table[s, : len(reader.pages)] = reader.pages
        arrays = torch.from_numpy(fields)
        logits = self._decoder.forward(
            Rows(
                token=arrays[0],
                position=arrays[1],
                sequence=arrays[2],
                parent=arrays[3],
                slot=arrays[4],
                adapter=arrays[5],
                logit_rows=torch.from_numpy(np.cumsum(counts, dtype=np.int32) - 1),
                page_table=torch.from_numpy(table),
                prefix_len=torch.tensor([len(r.tokens) for r in readers], dtype=torch.int32),
            ),
            self._pool,
        )
        for reader, (_, tokens) in zip(readers, work, strict=True):
            reader.tokens.extend(tokens)
        return logits


def _common(a: list[int], b: list[int], at_most: int) -> int:
    """Length of the common beginning of two lists, at most so much."""
    limit = min(len(a), len(b), at_most)
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
