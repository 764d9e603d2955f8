"""The target drafts for itself: the same packed weights with int8 rows, in the same KV pages.

Zhao et al., QSpec (2024), drafts with 4-bit weights and activations and verifies with the same
weights and 16-bit activations. Here the draft's activations are int8, which processors multiply
with codes at several times the rate of floats with unfolded weights, and drafts are drawn with
the request's own noise, so that the path does not change. Drafted keys
and values lie behind the committed ones in the sequence's own pages; the step writes its own
over them in every layer before attention reads that layer, so each draft begins from a history
that is the target's bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.kernels.sampling import Workspace, choose
from coppice.speculation.interfaces import DraftView, TargetPages
from coppice.speculation.price import PassPrice
from coppice.speculation.tree import DraftTree


class SharedDecoder(Protocol):
    """What is needed of the target's quicker twin."""

    def forward(self, rows: Rows, pool: KVPool) -> Tensor:
        """Logits ``[W, V]`` of the wanted rows; K and V written to the pool."""
        ...


class _Pass:
    """The rows of a drafting pass: of each sequence one, behind its drafts so far.

    Arrays are filled in once; from one pass to the next positions grow by one, and sequences
    whose chains are complete fall out at the end.
    """

    def __init__(self, views: Sequence[DraftView], pages: Sequence[Sequence[int]]) -> None:
        self._token = np.array([view.tokens[-1] for view in views], np.int32)
        # What stands behind a sequence's last token has that position, slot and beginning.
        self._at = np.array([len(view.tokens) - 1 for view in views], np.int32)
        table = np.full((len(views), max(map(len, pages))), -1, np.int32)
        for line, held in zip(table, pages, strict=True):
            line[: len(held)] = held
        self._table = torch.from_numpy(table)
        self._order = torch.arange(len(views), dtype=torch.int32)
        self._none = torch.full((len(views),), -1, dtype=torch.int32)
        self._rows: Rows | None = None

    def rows(self, count: int) -> Rows:
        """The first ``count`` sequences' rows; the same object for the same number."""
        if self._rows is None or self._rows.num_rows != count:
            token, at = torch.from_numpy(self._token), torch.from_numpy(self._at)
            self._rows = Rows(
                token=token[:count],
                position=at[:count],
                sequence=self._order[:count],
                parent=self._none[:count],
                slot=at[:count],
                adapter=self._none[:count],
                logit_rows=self._order[:count],
                page_table=self._table[:count],
                prefix_len=at[:count],
            )
        return self._rows

    def advance(self, tokens: NDArray[np.int32]) -> None:
        """Go on behind these tokens, one for each sequence still drafted for."""
        self._token[: len(tokens)] = np.maximum(tokens, 0)
        self._at += 1

    def positions(self, count: int) -> NDArray[np.int64]:
        """Of the tokens to be chosen."""
        return self._at[:count].astype(np.int64) + 1


class SelfDraft:
    """Proposes chains by running the target itself with int8 rows.

    It remembers nothing of a sequence: what it needs to know is in the target's pages.

    Args:
        decoder: the target over the same weights with int8 rows.
    """

    name = "self"
    branches = False

    def __init__(self, decoder: SharedDecoder) -> None:
        self._decoder = decoder
        self._pages: TargetPages | None = None
        self._price = PassPrice()
        self._workspace = Workspace()
        self.pass_s = 0.0
        """Of one sequence; `price` tells it of more."""

    def price(self, sequences: int) -> float:
        """See `Priced`."""
        return self._price.of(sequences)

    def share(self, pages: TargetPages) -> None:
        """See `Sharer`."""
        self._pages = pages

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """See `Proposer`. One pass for each token of the longest chain."""
        if self._pages is None:
            raise RuntimeError("nobody shared pages to draft in")
        trees: list[DraftTree | None] = [None] * len(views)
        held: dict[int, Sequence[int]] = {}
        for i in sorted(range(len(views)), key=lambda i: -limits[i]):
            if limits[i] > 0:
                pages = self._pages.reserve(views[i], len(views[i].tokens) + limits[i])
                if pages is not None:
                    held[i] = pages
        if held:
            able = [views[i] for i in held]
            chains = self._draft(able, list(held.values()), [limits[i] for i in held])
            for i, chain in zip(held, chains, strict=True):
                trees[i] = DraftTree.chain(self.name, chain) if chain else None
        return trees

    def forget(self, arrival: int) -> None:
        """See `Proposer`: there is nothing to forget."""

    def _draft(
        self,
        views: Sequence[DraftView],
        pages: Sequence[Sequence[int]],
        limits: Sequence[int],
    ) -> list[list[int]]:
        """A chain for each sequence, the longest first; they end where the draft knows nothing."""
        assert self._pages is not None
        pool, step = self._pages.pool, _Pass(views, pages)
        params = [view.row for view in views]
        found: list[list[int]] = []
        for depth in range(limits[0]):
            began = time.perf_counter()
            count = sum(limit > depth for limit in limits)
            logits = self._decoder.forward(step.rows(count), pool).numpy()
            positions = step.positions(count)
            choices = choose(logits, params[:count], positions, workspace=self._workspace)
            step.advance(choices.tokens)
            found.append(choices.tokens.tolist())
            self._price.add(count, time.perf_counter() - began)
        self.pass_s = self._price.of(1)
        return [_until_fault([level[i] for level in found[:n]]) for i, n in enumerate(limits)]


def _until_fault(chain: list[int]) -> list[int]:
    """The tokens before the first that could not be chosen."""
    return chain[: chain.index(-1)] if -1 in chain else chain
