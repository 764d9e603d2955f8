"""A small model of the same vocabulary drafts; the request's own noise ranks its tokens.

Ranking the draft's tokens with the noise that the target will use at the same position
(Gumbel-max coupling) makes the two agree as often as their distributions allow, at any
temperature. Leviathan et al., Fast Inference from Transformers via Speculative Decoding
(ICML 2023) is the method; the coupling replaces its rejection rule, so the path itself does
not change. Where a rule of `coppice.speculation.verify` is to keep the distribution instead,
children are drawn with noise of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coppice.kernels.ranking import distribution, rank
from coppice.kernels.sampling import RowParams
from coppice.speculation.growth import BestFirst, Growth, Shaped
from coppice.speculation.interfaces import DraftView
from coppice.speculation.reader import DraftDecoder, DraftReader, Reader
from coppice.speculation.shapes import Shape
from coppice.speculation.tree import ROOT, DraftTree, Drawn
from coppice.speculation.verify import Rule, draw_children

WIDTH = 8
"""Most children of a node of a freely growing tree."""
BEAMS = 4
"""Nodes of one tree that are extended in one pass."""
SHARPNESS = (0.25, 8.0)
"""Bounds of what the draft's scores are multiplied with to tell how often it is right."""
LEARNING_RATE = 0.05


@dataclass(slots=True)
class _Tree:
    """A tree being grown for one sequence."""

    index: int
    view: DraftView
    reader: Reader
    growth: Growth
    logits: dict[int, NDArray[np.float32]]
    """Of nodes whose children are drawn, until they are."""


class DraftModel:
    """Proposes trees by running a small decoder ahead of the target.

    Args:
        decoder: the small model.
        num_pages: KV pages it may hold; a sequence that finds none is not drafted for.
        page_size: tokens a page.
        max_context: positions the decoder knows.
        depth: most levels of a tree.
        rule: what verifies: it says how children are drawn.
        shape: of the trees of so many nodes, instead of growth by probability. Rules but
            ``match`` need one: their trees must not depend on the tokens drawn.
        token_s: what a token costs at present, in seconds; a pass that promises less than
            it costs is not made.
    """

    name = "draft"
    branches = True

    def __init__(
        self,
        decoder: DraftDecoder,
        *,
        num_pages: int,
        page_size: int,
        max_context: int,
        depth: int = 8,
        rule: Rule = "match",
        shape: Callable[[int, int], Shape] | None = None,
        token_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if rule != "match" and shape is None:
            raise ValueError(f"the rule {rule!r} needs trees of a fixed shape")
        self._reader = DraftReader(decoder, num_pages=num_pages, page_size=page_size)
        self._max_context = max_context
        self._depth = depth
        self._rule = rule
        self._shape = shape
        self._token_s = token_s
        self._sharpness = 1.5
        self._last: dict[int, tuple[int, DraftTree]] = {}
        self.pass_s = 0.0
        """Seconds of a drafting pass and all that is done about it, smoothed."""

    def propose(self, views: Sequence[DraftView], limits: Sequence[int]) -> list[DraftTree | None]:
        """See `Proposer`. One pass of the small model for each level of the deepest tree."""
        began = time.perf_counter()
        growing: list[_Tree] = []
        for i, (view, limit) in enumerate(zip(views, limits, strict=True)):
            if limit > 0 and (tree := self._begin(i, view, limit)) is not None:
                growing.append(tree)
        trees: list[DraftTree | None] = [None] * len(views)
        behind = max((len(t.view.tokens) - len(t.reader.tokens) for t in growing), default=0)
        active, passes = growing, 0
        while active:
            wants = [(tree, nodes) for tree in active if (nodes := tree.growth.wants())]
            if wants:
                self._pass(wants)
                passes += 1
            active = [tree for tree, _ in wants]
        for tree in growing:
            grown = tree.growth.finish()
            trees[tree.index] = grown if len(grown) else None
            if grown.logf:
                self._last[tree.view.arrival] = len(tree.view.tokens), grown
        if passes and behind <= self._depth + 1:  # else it read a prompt, or what it missed
            each = (time.perf_counter() - began) / passes
            self.pass_s += (0.1 if self.pass_s else 1.0) * (each - self.pass_s)
        return trees

    def forget(self, arrival: int) -> None:
        """See `Proposer`."""
        self._last.pop(arrival, None)
        self._reader.forget(arrival)

    def _learn(self, view: DraftView) -> None:
        """Compare the last tree for a sequence with what followed.

        A draft is never as sure of a choice as it is often right: two models whose logits
        differ by a little noise pick the same token far more often than with the token's
        probability. Scores are sharpened until the first child is accepted as often as told.
        """
        base, tree = self._last.pop(view.arrival, (0, DraftTree(self.name)))
        node: int | None = ROOT
        for token in view.tokens[base:]:
            children = [i for i in range(len(tree)) if tree.parents[i] == node]
            if node is None or not children:
                break
            best = max(children, key=tree.logf.__getitem__)
            told = math.exp(tree.logf[best] - (0.0 if node == ROOT else tree.logf[node]))
            right = tree.tokens[best] == token
            factor = math.exp(LEARNING_RATE * (right - told))
            self._sharpness = min(max(self._sharpness * factor, SHARPNESS[0]), SHARPNESS[1])
            node = tree.child(node, token)

    def _begin(self, index: int, view: DraftView, limit: int) -> _Tree | None:
        """A growth for one sequence; None where there is no room for it."""
        self._learn(view)
        depth = min(self._depth, limit)
        shape = None if self._shape is None else self._shape(limit, depth)
        slots = depth * (1 + BEAMS) if shape is None else depth + len(shape)
        if len(view.tokens) + depth > self._max_context:
            return None
        reader = self._reader.catch_up(view.arrival, view.tokens, slots)
        if reader is None:
            return None
        logits: dict[int, NDArray[np.float32]] = {}
        growth: Growth
        if shape is None:
            least = self.pass_s / max(self._token_s(), 1e-9) if self._token_s() else 0.0
            growth = BestFirst(self.name, limit, beams=BEAMS, depth=depth, least=least)
        else:
            growth = Shaped(self.name, shape, self._drawer(view, logits))
        return _Tree(index, view, reader, growth, logits)

    def _pass(self, wants: Sequence[tuple[_Tree, list[int]]]) -> None:
        """One pass of the small model for the wanted nodes of all trees."""
        logits = self._reader.read(
            [(t.reader, t.view.tokens, t.growth.tree, nodes) for t, nodes in wants]
        ).numpy()
        rows: list[RowParams] = []
        positions: list[int] = []
        for tree, nodes in wants:
            rows.extend([tree.view.row] * len(nodes))
            depths = _depths_of(tree.growth.tree, nodes)
            positions.extend(len(tree.view.tokens) + depth for depth in depths)
        width = min(WIDTH, logits.shape[1])
        tokens, shares = rank(logits, rows, positions, width, sharpness=self._sharpness)
        listed, logs = tokens.tolist(), shares.tolist()
        at = 0
        for tree, nodes in wants:
            for node in nodes:
                tree.logits[node] = logits[at]
                tree.growth.extend(node, listed[at], logs[at])
                at += 1

    def _drawer(
        self, view: DraftView, logits: dict[int, NDArray[np.float32]]
    ) -> Callable[[int, int, int], Drawn] | None:
        """Draws children for the rule; None where they are matched."""
        if self._rule == "match" or view.row.inv_temperature == 0.0:
            return None
        row, rule, base = view.row, self._rule, len(view.tokens)

        def draw(node: int, depth: int, count: int) -> Drawn:
            q = distribution(logits.pop(node), row)
            return draw_children(q, count, rule, seed=row.seed, position=base + depth)

        return draw


def _depths_of(tree: DraftTree, nodes: Sequence[int]) -> list[int]:
    """Levels below the root; 0 for the root itself."""
    found = []
    for node in nodes:
        depth, above = 0, node
        while above != ROOT:
            depth, above = depth + 1, tree.parents[above]
        found.append(depth)
    return found
