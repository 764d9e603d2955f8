"""One step: carry out a plan, run the model once, choose tokens, commit.

Nothing here knows a feature by name: a prefill chunk, a decode and a recomputed prompt are
rows that close the gap between a sequence's tokens and its KV, and a speculated tree is rows
beyond it. Choosing walks a tree from its root: each token is drawn from the logits of the
node it follows, as it would have been drawn without the tree, until one is drawn that the
tree does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.engine.batch import BatchLayout
from coppice.engine.loading import Decoder
from coppice.engine.messages import TokenLogprob
from coppice.engine.pages import SequencePages
from coppice.engine.sampler import FAULTS, sample
from coppice.engine.sequence import Sequence
from coppice.errors import CoppiceError
from coppice.kernels.sampling import Mask
from coppice.scheduling import Grant
from coppice.speculation import ROOT, DraftTree


@dataclass(frozen=True, slots=True)
class Choice:
    """A token chosen for a sequence, or why none could be (``fault``, for the client)."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None
    fault: str | None


Accept = Callable[[Choice], bool]
"""Appends a chosen token to its sequence; says whether the sequence goes on."""


@dataclass(slots=True)
class Walk:
    """A sequence whose next tokens are being chosen.

    Attributes:
        place: its last token's place among the step's logits.
        tree: what was speculated.
        node: how far the walk has come.
        path: tree nodes accepted so far.
    """

    sequence: Sequence
    place: int
    tree: DraftTree | None
    node: int = ROOT
    path: list[int] = field(default_factory=list)

    def follow(self, token: int) -> bool:
        """Go to the node that holds the chosen token; False where the tree has none."""
        child = None if self.tree is None else self.tree.child(self.node, token)
        if child is None:
            return False
        self.node = child
        self.path.append(child)
        return True


@dataclass(slots=True)
class StepResult:
    """What a step did, and how long the model took."""

    num_rows: int = 0
    num_chosen: int = 0
    walks: list[Walk] = field(default_factory=list)
    model_s: float = 0.0


class StepRunner:
    """Runs granted rows through the model.

    Args:
        model: the decoder.
        pool: KV storage the decoder writes.
        pages: page bookkeeping of the same pool.
        layout: host arrays of the batch.
    """

    def __init__(
        self, model: Decoder, pool: KVPool, pages: SequencePages, layout: BatchLayout
    ) -> None:
        self._model = model
        self._pool = pool
        self._pages = pages
        self._layout = layout

    def run(
        self, grants: Iterable[Grant], trees: Mapping[int, DraftTree], accept: Accept
    ) -> StepResult:
        """One pass of the model over the granted rows and the trees behind them.

        A sequence whose pages cannot be had after all is left out; it is asked for again in
        the next plan, which sees the true page count. A tree without pages is dropped.

        Args:
            grants: rows by sequence.
            trees: by the sequence's arrival number; only for those granted their last token.
            accept: takes every chosen token, in order.
        """
        result = StepResult()
        self._layout.clear()
        ran: list[tuple[Sequence, int]] = []
        for grant in grants:
            sequence = grant.sequence
            assert isinstance(sequence, Sequence)
            num_rows = min(grant.num_rows, sequence.num_tokens - sequence.num_computed)
            tree = trees.get(sequence.arrival)
            if tree is not None and not self._prepare(sequence, num_rows + len(tree)):
                tree = None
            if not self._prepare(sequence, num_rows):
                continue
            place = self._layout.add(sequence, num_rows, tree)
            if place is not None:
                result.walks.append(Walk(sequence, place, tree))
            ran.append((sequence, num_rows))
            result.num_rows += num_rows + (0 if tree is None else len(tree))
        if not ran:
            return result
        began = time.perf_counter()
        logits = self._model.forward(self._layout.rows(), self._pool)
        result.model_s = time.perf_counter() - began
        for sequence, num_rows in ran:
            self._commit(sequence, num_rows)
        result.num_chosen = _choose_all(logits, result.walks, accept)
        for walk in result.walks:
            if walk.path and walk.sequence.slot >= 0:
                self._keep(walk)
        return result

    def _prepare(self, sequence: Sequence, num_rows: int) -> bool:
        held = len(sequence.pages)
        if not self._pages.grow(sequence, sequence.num_computed + num_rows):
            return False
        if len(sequence.pages) != held:
            self._layout.write_pages(sequence, held)
        return True

    def _keep(self, walk: Walk) -> None:
        """Bring the accepted path's K and V behind the sequence's own."""
        first = walk.sequence.num_computed
        moves = [(first + n, first + i) for i, n in enumerate(walk.path) if n != i]
        if moves:
            self._pool.move(walk.sequence.pages, moves)
        self._commit(walk.sequence, len(walk.path))

    def _commit(self, sequence: Sequence, num_rows: int) -> None:
        """Count rows whose K and V are in place."""
        sequence.num_computed += num_rows
        first = sequence.num_sealed
        if self._pages.seal(sequence):
            self._layout.write_pages(sequence, first)


def _choose_all(logits: Tensor, walks: list[Walk], accept: Accept) -> int:
    """Walk all trees, one level of every sequence at a time; tokens chosen."""
    chosen, open_walks = 0, walks
    while open_walks:
        places = [walk.place + 1 + walk.node for walk in open_walks]
        whole = len(places) == logits.shape[0]
        rows = logits if whole else logits.index_select(0, torch.tensor(places))
        choices = _choose(rows, [walk.sequence for walk in open_walks])
        chosen += len(choices)
        open_walks = [
            walk
            for walk, choice in zip(open_walks, choices, strict=True)
            if accept(choice) and walk.follow(choice.token)
        ]
    return chosen


def _choose(logits: Tensor, sequences: list[Sequence]) -> list[Choice]:
    """One token for each sequence from its row of ``logits [W, V]``.

    A constraint that fails takes its own row with it and no other.
    """
    faults: dict[int, str] = {}
    masks = None
    if any(s.grammar is not None for s in sequences):
        masks = [_mask(s, i, faults) for i, s in enumerate(sequences)]
    drawn = sample(logits, [s.sampler for s in sequences], [s.num_tokens for s in sequences], masks)
    tokens = drawn.tokens.tolist()
    for i, code in enumerate(drawn.faults.tolist()):
        if code:
            faults.setdefault(i, FAULTS[code])
    for i, sequence in enumerate(sequences):
        if sequence.grammar is not None and i not in faults:
            try:
                sequence.grammar.accept(tokens[i])
            except CoppiceError as error:
                faults[i] = error.message
    logprobs = drawn.logprobs or [None] * len(sequences)
    return [
        Choice(sequence, tokens[i], logprobs[i], faults.get(i))
        for i, sequence in enumerate(sequences)
    ]


def _mask(sequence: Sequence, row: int, faults: dict[int, str]) -> Mask | None:
    if sequence.grammar is None:
        return None
    try:
        return sequence.grammar.mask()
    except CoppiceError as error:
        faults[row] = error.message
        return None
