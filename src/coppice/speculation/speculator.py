"""Proposers and controller together: one tree for each sequence that decodes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coppice.speculation.control import NO_NEEDS, Controller
from coppice.speculation.interfaces import (
    DraftView,
    Learner,
    Priced,
    Proposer,
    Sharer,
    TargetPages,
)
from coppice.speculation.tree import DraftTree
from coppice.speculation.trial import Trial

_log = logging.getLogger(__name__)

REST_AFTER, REST_STEPS = 8, 8
"""Steps without anything worth verifying after which a sequence is looked at in one of so many."""


@dataclass(slots=True)
class _Account:
    """What a proposer did for one step."""

    seconds: float = 0.0
    nodes: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Shown:
    """A tree grown when a sequence had ``at`` tokens."""

    at: int
    tree: DraftTree
    verified: bool


class Speculator:
    """Grows this step's trees.

    A proposer that raises or returns garbage is left out of the step and counted; requests
    do not notice.

    Args:
        proposers: asked in order. Of those that take next to no time the first that has
            something for a sequence is taken; one that takes time drafts where it promises more.
        controller: how much is worth it.
        vocab_size: the target's.
        max_nodes: of a tree that branches; 0 lets none branch.
        on_trial: proposers that cost more than they save are not asked for a while, except
            where a request names them.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        controller: Controller,
        vocab_size: int,
        *,
        max_nodes: int = 0,
        on_trial: bool = False,
    ) -> None:
        self._proposers = proposers
        self._controller = controller
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self.totals: Counter[str] = Counter()
        """``drafted`` and ``accepted`` tokens, ``faults``; ``drafted_X`` by proposer."""
        self.accepted_at: list[int] = []
        """Trees whose path was kept at least to this depth, by depth."""
        self._shown: dict[int, _Shown] = {}
        self._rests: dict[int, int] = {}
        self._trials = {p.name: Trial() for p in proposers} if on_trial else {}
        self._accounts: dict[str, _Account] = {}
        self._sequences = 0
        self._needs = NO_NEEDS
        self._skipped = False

    def share(self, pages: TargetPages) -> None:
        """Proposers that draft in the target's pages may use these."""
        for proposer in self._proposers:
            if isinstance(proposer, Sharer):
                proposer.share(pages)

    def _is_late(self, arrival: int) -> bool:
        """Whether the step's own token is not enough for a sequence."""
        return self._needs.get(arrival, 0.0) > 1.0

    def skips(self, views: Iterable[DraftView]) -> bool:
        """Whether nobody is to be asked for any of these, so that the step does without `grow`."""
        resting = bool(self._trials) and not any(trial.on for trial in self._trials.values())
        self._skipped = resting and all(view.speculate in ("auto", "off") for view in views)
        if self._skipped:
            for trial in self._trials.values():
                trial.rest()
        return self._skipped

    def grow(
        self,
        views: Sequence[DraftView],
        *,
        rows: int,
        spare: int,
        needs: Mapping[int, float] = NO_NEEDS,
    ) -> dict[int, DraftTree]:
        """Trees by sequence number.

        Args:
            views: sequences that decode in this step.
            rows: rows of the step without trees.
            spare: rows the trees may take together.
            needs: by sequence number, tokens it must get to be on time (`Controller.select`).
        """
        self._accounts.clear()
        self._needs, self._skipped = needs, False
        for trial in self._trials.values():
            trial.rest()
        at = time.perf_counter()
        self._sequences = len(views)
        for view in views:
            self._learn(view)
        grown: dict[int, DraftTree] = {}
        if spare > 0:
            for proposer in self._proposers:
                asked = self._open(proposer, views, grown)
                if asked:
                    grown |= self._ask(proposer, asked, rows, spare, grown)
                    before, at = at, time.perf_counter()
                    self._accounts[proposer.name] = _Account(at - before)
        # Draws verified as such must all stay: what is chosen by its probability is none.
        trees = {arrival: tree for arrival, tree in grown.items() if tree.drawn}
        fixed = sum(map(len, trees.values()))
        trees |= self._controller.select(
            {arrival: tree for arrival, tree in grown.items() if not tree.drawn},
            sequences=len(views),
            rows=rows + fixed,
            spare=spare - fixed,
            needs=needs,
        )
        for view in views:
            arrival = view.arrival
            self._rests[arrival] = 0 if arrival in trees else self._rests.get(arrival, 0) + 1
            if arrival in grown and grown[arrival].logf:
                self._shown[arrival] = _Shown(len(view.tokens), grown[arrival], arrival in trees)
        now = time.perf_counter()
        for account in self._accounts.values():
            account.seconds += (now - at) / len(self._accounts)
        return trees

    def observe(self, arrival: int, tree: DraftTree, accepted: int) -> None:
        """Learn that the first ``accepted`` levels of a tree were kept."""
        self.totals["drafts"] += 1
        if accepted > len(self.accepted_at):
            self.accepted_at += [0] * (accepted - len(self.accepted_at))
        for level in range(accepted):
            self.accepted_at[level] += 1
        self._controller.observe(tree.source, arrival, max(tree.depths()), accepted)
        if (account := self._accounts.get(tree.source)) is not None:
            account.nodes += len(tree)
            account.accepted += accepted
        self.totals["drafted"] += len(tree)
        self.totals["accepted"] += accepted
        self.totals[f"drafted_{tree.source}"] += len(tree)
        self.totals[f"accepted_{tree.source}"] += accepted

    def step_took(self, rows: int, trees: int, seconds: float) -> None:
        """Learn what a step with so many rows and trees took; nothing from those skipped."""
        if self._skipped:
            return
        self._controller.step_took(rows, trees, seconds)
        if not self._trials or not self._accounts:
            return
        if any(need > 1.0 for need in self._needs.values()):
            return  # who is late is guessed for whether it pays or not: no verdict
        nodes = sum(account.nodes for account in self._accounts.values())
        plain_s = self._controller.plain_s(self._sequences)
        more_s = min(seconds - self._controller.plain_s(rows - nodes), 3.0 * plain_s)
        for name, account in self._accounts.items():
            own = more_s * account.nodes / nodes if nodes else 0.0
            saved = account.accepted / self._sequences
            self._trials[name].asked(saved, (account.seconds + own) / plain_s)

    def forget(self, arrival: int) -> None:
        """The sequence has ended or lost its pages."""
        self._controller.forget(arrival)
        self._shown.pop(arrival, None)
        self._rests.pop(arrival, None)
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

    def figures(self) -> dict[str, Any]:
        """Counts and memory, by the names they have in a report of live figures."""
        learners = [p for p in self._proposers if isinstance(p, Learner)]
        return {
            "drafts": self.totals["drafts"],
            "drafted": self.totals["drafted"],
            "accepted": self.totals["accepted"],
            "accepted_at": list(self.accepted_at),
            "speculation_faults": self.totals["faults"],
            "history_bytes": sum(p.size_bytes for p in learners),
            "history_evicted": sum(p.evicted for p in learners),
        }

    @property
    def names(self) -> list[str]:
        """What a request may ask for by name."""
        return [proposer.name for proposer in self._proposers]

    def _learn(self, view: DraftView) -> None:
        """What followed the tree that was shown last, verified or not."""
        shown = self._shown.pop(view.arrival, None)
        if shown is None or shown.at > len(view.tokens):
            return
        committed, tree = view.tokens[shown.at :], shown.tree
        kept = self._controller.calibration.learn(tree, view.arrival, committed)
        if not shown.verified:  # `observe` will not be called
            drafted = min(len(committed), max(tree.depths()))
            self._controller.observe(tree.source, view.arrival, drafted, kept)

    def _open(
        self, proposer: Proposer, views: Sequence[DraftView], grown: dict[int, DraftTree]
    ) -> list[DraftView]:
        """The sequences this proposer may draft for; one that takes time may outbid another."""
        trial = self._trials.get(proposer.name)
        names = ("auto", proposer.name) if trial is None or trial.on else (proposer.name,)
        return [
            v
            for v in views
            if (v.speculate in names or (v.speculate == "auto" and self._is_late(v.arrival)))
            and (v.arrival not in grown or proposer.pass_s > 0.0)
            and (proposer.pass_s > 0.0 or self._is_due(v.arrival))
        ]

    def _is_due(self, arrival: int) -> bool:
        """Sequences for which nothing was worth verifying for a while are asked for less often."""
        if self._is_late(arrival):
            return True
        rests = self._rests.get(arrival, 0)
        return rests < REST_AFTER or (rests + arrival) % REST_STEPS == 0

    def _limits(
        self,
        proposer: Proposer,
        views: Sequence[DraftView],
        rows: int,
        spare: int,
        grown: dict[int, DraftTree],
    ) -> list[int]:
        """Most nodes for each sequence; none where another's tree promises as much."""
        control, pass_s = self._controller, proposer.pass_s
        if isinstance(proposer, Priced):
            pass_s = proposer.price(len(views))
        if pass_s == 0.0:
            most = self._max_nodes if proposer.branches and self._max_nodes else control.max_depth
            limits = [min(most, spare)] * len(views)
        else:
            limits = control.depths(
                proposer.name,
                [v.arrival for v in views],
                rows=rows,
                spare=spare,
                pass_s=pass_s,
                needs=self._needs,
            )
            for i, view in enumerate(views):
                rival = grown.get(view.arrival)
                if rival is not None:
                    promised = sum(control.chances(rival, view.arrival)[: limits[i]])
                    if promised >= control.gain(proposer.name, view.arrival, limits[i]):
                        limits[i] = 0
            if proposer.branches and self._max_nodes and any(limits):
                share = min(self._max_nodes, spare // sum(n > 0 for n in limits))
                limits = [share if n > 0 else 0 for n in limits]
        # The step itself brings one token: a draft of all that may follow would be too long.
        return [min(n, v.room - 1) for n, v in zip(limits, views, strict=True)]

    def _ask(
        self,
        proposer: Proposer,
        views: Sequence[DraftView],
        rows: int,
        spare: int,
        grown: dict[int, DraftTree],
    ) -> dict[int, DraftTree]:
        if not views:
            return {}
        limits = self._limits(proposer, views, rows, spare, grown)
        if max(limits) <= 0:
            return {}
        try:
            trees = proposer.propose(views, limits)
            fine = len(trees) == len(views) and all(
                t is None or (len(t) <= limit and t.is_sound(self._vocab_size))
                for t, limit in zip(trees, limits, strict=True)
            )
        except Exception:  # a plug-in's fault must cost no request
            _log.exception("Proposer %s failed; this step is not speculated.", proposer.name)
            fine = False
        if fine:
            return {v.arrival: t for v, t in zip(views, trees, strict=True) if t}
        self.totals["faults"] += 1
        for view in views:
            proposer.forget(view.arrival)
        return {}
