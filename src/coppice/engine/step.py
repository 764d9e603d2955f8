"""One step: carry out a plan, run the model once, choose tokens, commit.

Nothing here knows a feature by name: a prefill chunk, a decode and a recomputed prompt are
rows that close the gap between a sequence's tokens and its KV.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Choice:
    """A token chosen for a sequence, or why none could be (``fault``, for the client)."""

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None
    fault: str | None


@dataclass(slots=True)
class StepResult:
    """What a step did: tokens chosen, in row order, and what it took."""

    num_rows: int = 0
    choices: list[Choice] = field(default_factory=list)
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

    def run(self, grants: list[Grant]) -> StepResult:
        """One pass of the model over the granted rows.

        A sequence whose pages cannot be had after all is left out; it is asked for again in
        the next plan, which sees the true page count.
        """
        result = StepResult()
        self._layout.clear()
        ran: list[tuple[Sequence, int]] = []
        complete: list[Sequence] = []
        for grant in grants:
            sequence = grant.sequence
            assert isinstance(sequence, Sequence)
            num_rows = min(grant.num_rows, sequence.num_tokens - sequence.num_computed)
            if not self._prepare(sequence, num_rows):
                continue
            if self._layout.add(sequence, num_rows):
                complete.append(sequence)
            ran.append((sequence, num_rows))
            result.num_rows += num_rows
        if not ran:
            return result
        began = time.perf_counter()
        logits = self._model.forward(self._layout.rows(), self._pool)
        result.model_s = time.perf_counter() - began
        for sequence, num_rows in ran:
            sequence.num_computed += num_rows
            first = sequence.num_sealed
            if self._pages.seal(sequence):
                self._layout.write_pages(sequence, first)
        if complete:
            result.choices = _choose(logits, complete)
        return result

    def _prepare(self, sequence: Sequence, num_rows: int) -> bool:
        held = len(sequence.pages)
        if not self._pages.grow(sequence, sequence.num_computed + num_rows):
            return False
        if len(sequence.pages) != held:
            self._layout.write_pages(sequence, held)
        return True


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
