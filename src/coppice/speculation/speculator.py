"""Proposers and controller together: one tree for each sequence that decodes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence

from coppice.speculation.control import Controller
from coppice.speculation.interfaces import DraftView, Learner, Proposer
from coppice.speculation.tree import DraftTree

_log = logging.getLogger(__name__)


class Speculator:
    """Grows this step's trees.

    A proposer that raises or returns garbage is left out of the step and counted; requests
    do not notice.

    Args:
        proposers: asked in order; the first that has something for a sequence is taken.
        controller: how much is worth it.
        vocab_size: the target's.
        max_nodes: of a tree that branches; 0 lets none branch.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        controller: Controller,
        vocab_size: int,
        *,
        max_nodes: int = 0,
    ) -> None:
        self._proposers = proposers
        self._controller = controller
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self.totals: Counter[str] = Counter()
        """``drafted`` and ``accepted`` tokens, ``faults``; ``drafted_X`` by proposer."""
        self.draft_s = 0.0

    def grow(self, views: Sequence[DraftView], *, rows: int, spare: int) -> dict[int, DraftTree]:
        """Trees by sequence number.

        Args:
            views: sequences that decode in this step.
            rows: rows of the step without trees.
            spare: rows the trees may take together.
        """
        began = time.perf_counter()
        trees: dict[int, DraftTree] = {}
        for proposer in self._proposers:
            left = [
                v
                for v in views
                if v.arrival not in trees and v.speculate in ("auto", proposer.name)
            ]
            if not left or spare <= 0:
                break
            for view, tree in zip(left, self._ask(proposer, left, rows, spare), strict=True):
                if tree is not None and len(tree):
                    trees[view.arrival] = tree
                    rows += len(tree)
                    spare -= len(tree)
        self.draft_s += time.perf_counter() - began
        return trees

    def observe(self, arrival: int, tree: DraftTree, accepted: int) -> None:
        """Learn that the first ``accepted`` levels of a tree were kept."""
        self._controller.observe(tree.source, arrival, max(tree.depths()), accepted)
        self.totals["drafted"] += len(tree)
        self.totals["accepted"] += accepted
        self.totals[f"drafted_{tree.source}"] += len(tree)
        self.totals[f"accepted_{tree.source}"] += accepted

    def forget(self, arrival: int) -> None:
        """The sequence has ended or lost its pages."""
        self._controller.forget(arrival)
        for proposer in self._proposers:
            proposer.forget(arrival)

    def learn(self, view: DraftView, num_prompt: int) -> None:
        """An answer is complete: proposers that remember may keep it."""
        for proposer in self._proposers:
            if isinstance(proposer, Learner):
                try:
                    proposer.learn(view, num_prompt)
                except Exception:  # as in `_ask`
                    _log.exception("Proposer %s failed to learn.", proposer.name)
                    self.totals["faults"] += 1

    def close(self) -> None:
        """The engine ends."""
        for proposer in self._proposers:
            if isinstance(proposer, Learner):
                proposer.close()

    @property
    def names(self) -> list[str]:
        """What a request may ask for by name."""
        return [proposer.name for proposer in self._proposers]

    def _ask(
        self, proposer: Proposer, views: Sequence[DraftView], rows: int, spare: int
    ) -> list[DraftTree | None]:
        limits = self._controller.depths(
            proposer.name,
            [v.arrival for v in views],
            rows=rows,
            spare=spare,
            pass_s=proposer.pass_s,
        )
        # The step itself brings one token: a draft of all that may follow would be too long.
        limits = [min(n, v.room - 1) for n, v in zip(limits, views, strict=True)]
        if max(limits) <= 0:
            return [None] * len(views)
        if proposer.branches and self._max_nodes:
            share = min(self._max_nodes, spare // sum(n > 0 for n in limits))
            most = [min(share, v.room - 1) for v in views]
            limits = [m if n > 0 else 0 for n, m in zip(limits, most, strict=True)]
        try:
            trees = proposer.propose(views, limits)
            fine = len(trees) == len(views) and all(
                t is None or (len(t) <= limit and t.is_sound(self._vocab_size))
                for t, limit in zip(trees, limits, strict=True)
            )
        except Exception:  # a plug-in's fault must cost no request
            _log.exception("Proposer %s failed; this step is not speculated.", proposer.name)
            fine = False
        if fine and proposer.branches and any(t and t.logf and not t.drawn for t in trees):
            return self._controller.trim(trees, rows=rows, spare=spare)
        if fine:
            return trees
        self.totals["faults"] += 1
        for view in views:
            proposer.forget(view.arrival)
        return [None] * len(views)
