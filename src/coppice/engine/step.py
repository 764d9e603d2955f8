"""From granted rows to chosen tokens: lay out, run the model once, commit, choose.

Nothing here knows a feature by name: a prefill chunk, a decode and a recomputed prompt are
rows that close the gap between a sequence's tokens and its KV, and a speculated tree is rows
beyond it. Choosing walks a tree from its root: each token is drawn from the logits of the
node it follows, as it would have been drawn without the tree, until one is drawn that the
tree does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.engine.batch import BatchLayout, PageTable
from coppice.engine.decide import decide
from coppice.engine.faults import Fault, describe
from coppice.engine.flight import Flight, Ran, Walk, largest_tree
from coppice.engine.loading import Decoder
from coppice.engine.messages import StepTree, TokenLogprob
from coppice.engine.pages import SequencePages
from coppice.engine.sampler import FAULTS, sample
from coppice.engine.sequence import Sequence
from coppice.kernels.rows import Rows
from coppice.kernels.sampling import Mask, Workspace
from coppice.scheduling import Grant
from coppice.speculation import DraftTree, DraftView


class Accept(Protocol):
    """Takes a chosen token, or why none could be (``fault``, for the client)."""

    def __call__(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None, fault: Fault | None
    ) -> bool:
        """Append it to its sequence; False where that ends the sequence."""
        ...


class StepRunner:
    """Runs granted rows through the model.

    Args:
        model: the decoder.
        pool: KV storage the decoder writes.
        pages: page bookkeeping of the same pool.
        table: where the pages of running sequences are; other runners may share it.
        max_rows: rows a flight may have.
    """

    def __init__(
        self, model: Decoder, *, pool: KVPool, pages: SequencePages, table: PageTable, max_rows: int
    ) -> None:
        self._model = model
        self._pool = pool
        self._pages = pages
        self._table = table
        self._layout = BatchLayout(max_rows, table)
        self._page_size = pool.layout.page_size
        self._workspace = Workspace()
        self.shown: StepTree | None = None
        """The largest tree of the last flight that had one."""

    def run(
        self, grants: Iterable[Grant], trees: Mapping[int, DraftTree], accept: Accept
    ) -> Flight:
        """`lay_out`, `compute` and `take`."""
        flight = self.lay_out(grants, trees)
        self.compute(flight)
        self.take(flight, accept)
        return flight

    def lay_out(self, grants: Iterable[Grant], trees: Mapping[int, DraftTree]) -> Flight:
        """The granted rows and the trees behind them, ready to be computed.

        A sequence whose pages cannot be had after all is left out; it is asked for again in
        the next plan, which sees the true page count. A tree without pages is dropped.

        Args:
            grants: rows by sequence.
            trees: by the sequence's arrival number; only for those granted their last token.

        Returns:
            A flight, the only one of this runner until it has been taken.
        """
        flight = Flight(self, list(grants))
        layout = self._layout
        layout.clear()
        for grant in flight.grants:
            sequence = _sequence(grant)
            end = min(sequence.num_computed + grant.num_rows, len(sequence.tokens))
            tree = trees.get(sequence.arrival) if trees else None
            if tree is not None and not self._prepare(sequence, end + len(tree)):
                tree = None
            if not self._prepare(sequence, end):
                continue
            num_rows = end - sequence.num_computed
            place = layout.add(sequence, num_rows, tree)
            if place is not None and tree is not None:
                sequence.drafted += len(tree)
            flight.add(
                Ran(sequence, end, num_rows, 0 if tree is None else len(tree)),
                None if place is None else Walk(sequence, place, tree),
            )
        if flight.ran:
            flight.rows = layout.rows()
        return flight

    def compute(self, flight: Flight) -> None:
        """The model's forward pass and nothing else: any thread may do it."""
        if flight.rows is None:
            return
        try:
            flight.found = self._greedy(flight.rows, flight.walks)
            if flight.found is None:
                flight.found = self._model.forward(flight.rows, self._pool)
        except BaseException as error:
            flight.error = error

    def take(self, flight: Flight, accept: Accept) -> None:
        """Commit what was computed, and choose tokens.

        Rows of sequences that have lost their pages meanwhile count for nothing.

        Args:
            flight: computed.
            accept: takes every chosen token, in order.
        """
        if flight.error is not None:
            self._run_alone(flight, flight.error, accept)
            return
        for sequence, end, *_ in flight.ran:
            if sequence.slot < 0:
                continue
            sequence.num_computed = end
            if end >= (sequence.num_sealed + 1) * self._page_size:
                self._seal(sequence)
        walks = flight.walks = [walk for walk in flight.walks if walk.sequence.slot >= 0]
        if isinstance(flight.found, list):
            flight.num_chosen = _take(flight.found, walks, accept)
        elif flight.found is not None:
            flight.num_chosen = self._choose_all(flight.found, walks, accept)
        self.shown = largest_tree(walks) or self.shown
        for walk in walks:
            if walk.path and walk.sequence.slot >= 0:
                self._keep(walk)

    def _run_alone(self, flight: Flight, error: BaseException, accept: Accept) -> None:
        """After a fault of the model: each sequence by itself, so that only the guilty fail."""
        why = describe(error, "The model")
        if len(flight.ran) > 1:
            flight.become(
                [self.run([g], {}, accept) for g in flight.grants if _sequence(g).slot >= 0]
            )
            return
        [ran] = flight.ran
        if ran.sequence.slot >= 0:
            accept(ran.sequence, -1, None, why)
        flight.become([])

    def _greedy(self, rows: Rows, walks: list[Walk]) -> list[int] | None:
        """Run the model for nothing but the likeliest tokens, if nobody wants more."""
        if not walks:
            return None
        for walk in walks:
            if not walk.sequence.sampler.is_argmax or walk.sequence.grammar is not None:
                return None
        vocab_size = walks[0].sequence.sampler.row.vocab_size
        return self._model.greedy(rows, self._pool, vocab_size)

    @property
    def pool(self) -> KVPool:
        """See `coppice.speculation.interfaces.TargetPages`."""
        return self._pool

    def reserve(self, view: DraftView, num_tokens: int) -> list[int] | None:
        """See `coppice.speculation.interfaces.TargetPages`."""
        assert isinstance(view, Sequence)
        return view.pages if self._prepare(view, num_tokens) else None

    def _prepare(self, sequence: Sequence, end: int) -> bool:
        """Make sure of pages for the first ``end`` tokens."""
        held = len(sequence.pages)
        if end <= held * self._page_size:
            return True
        if not self._pages.grow(sequence, end):
            return False
        self._table.write(sequence, held)
        return True

    def _keep(self, walk: Walk) -> None:
        """Bring the accepted path's K and V behind the sequence's own."""
        first = walk.sequence.num_computed
        moves = [(first + n, first + i) for i, n in enumerate(walk.path) if n != i]
        if moves:
            self._pool.move(walk.sequence.pages, moves)
        walk.sequence.num_computed = first + len(walk.path)
        self._seal(walk.sequence)

    def _seal(self, sequence: Sequence) -> None:
        first = sequence.num_sealed
        if self._pages.seal(sequence):
            self._table.write(sequence, first)

    def _choose_all(self, logits: Tensor, walks: list[Walk], accept: Accept) -> int:
        """Walk all trees, one level of every sequence at a time; tokens chosen."""
        chosen, open_walks = 0, walks
        while open_walks:
            rows = logits
            if len(open_walks) != logits.shape[0]:
                places = [walk.place + 1 + walk.node for walk in open_walks]
                rows = logits.index_select(0, torch.tensor(places))
            tokens, logprobs, faults = self._choose(rows, open_walks)
            chosen += len(tokens)
            going = []
            for i, walk in enumerate(open_walks):
                logprob = None if logprobs is None else logprobs[i]
                fault = faults.get(i)
                # The walk goes first: a token that ends its sequence counts like any other.
                follows = fault is None and walk.follow(tokens[i])
                if accept(walk.sequence, tokens[i], logprob, fault) and follows:
                    going.append(walk)
            open_walks = going
        return chosen

    def _choose(
        self, logits: Tensor, walks: list[Walk]
    ) -> tuple[list[int], list[TokenLogprob | None] | None, dict[int, Fault]]:
        """One token for each walk from its row of ``logits [W, V]``, logprobs, faults by row.

        A constraint that fails takes its own row with it and no other.
        """
        faults: dict[int, Fault] = {}
        sequences = [walk.sequence for walk in walks]
        constrained = [i for i, s in enumerate(sequences) if s.grammar is not None]
        masks = None
        if constrained:
            masks = [_mask(s, i, faults) for i, s in enumerate(sequences)]
        for i, walk in enumerate(walks):
            draws = None if walk.tree is None else walk.tree.drawn.get(walk.node)
            if draws is not None and i not in faults:
                masks = masks or [None] * len(walks)
                masks[i] = decide(walk.sequence, draws, logits[i], masks[i])
        states, positions = [s.sampler for s in sequences], [len(s.tokens) for s in sequences]
        try:
            drawn = sample(logits, states, positions, masks, workspace=self._workspace)
        except BaseException as error:
            if len(walks) > 1:
                return self._choose_alone(logits, walks)
            return [-1], None, faults | {0: describe(error, "The sampler")}
        tokens = drawn.tokens.tolist()
        for i, code in enumerate(drawn.faults.tolist()):
            if code:
                faults.setdefault(i, FAULTS[code])
        for i in constrained:
            grammar = sequences[i].grammar
            if grammar is not None and i not in faults:
                try:
                    grammar.accept(tokens[i])
                except BaseException as error:
                    faults[i] = describe(error, "The grammar")
        return tokens, drawn.logprobs, faults

    def _choose_alone(
        self, logits: Tensor, walks: list[Walk]
    ) -> tuple[list[int], list[TokenLogprob | None] | None, dict[int, Fault]]:
        """`_choose` row by row, after a fault of the sampler."""
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        faults: dict[int, Fault] = {}
        for i, walk in enumerate(walks):
            chosen, scores, failed = self._choose(logits[i : i + 1], [walk])
            tokens += chosen
            logprobs += scores or [None]
            if failed:
                faults[i] = failed[0]
        return tokens, logprobs, faults


def _take(tokens: list[int], walks: list[Walk], accept: Accept) -> int:
    """Walk trees whose every node's token is known, or ``-fault``; tokens chosen."""
    chosen = 0
    for walk in walks:
        going = True
        while going:
            token = tokens[walk.place + 1 + walk.node]
            fault = None if token >= 0 else FAULTS[-token]
            chosen += 1
            going = accept(walk.sequence, token, None, fault) and walk.follow(token)
    return chosen


def _sequence(grant: Grant) -> Sequence:
    assert isinstance(grant.sequence, Sequence)
    return grant.sequence


def _mask(sequence: Sequence, row: int, faults: dict[int, Fault]) -> Mask | None:
    if sequence.grammar is None:
        return None
    try:
        return sequence.grammar.mask()
    except BaseException as error:
        faults[row] = describe(error, "The grammar")
        return None
