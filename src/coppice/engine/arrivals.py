"""Arrivals: requests become sequences, numbered in the order they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coppice.engine.loading import EngineModel
from coppice.engine.messages import Progress
from coppice.engine.request import Grammar, Request
from coppice.engine.sampler import SamplerState
from coppice.engine.sequence import Sequence
from coppice.scheduling.interfaces import RequestOrder

if TYPE_CHECKING:
    from coppice.engine.grammar import GrammarCompiler
    from coppice.engine.grammar_state import GrammarState


class Arrivals:
    """Makes the sequences of one engine.

    Args:
        model: whose tokens they are of.
        context_length: most tokens of one.
        order: ranks them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: EngineModel,
        context_length: int,
        order: RequestOrder,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._context_length = context_length
        self._order = order
        self._clock = clock
        self._count = 0
        self._grammars: GrammarCompiler | None = None

    def sequence(self, request: Request, progress: Progress) -> Sequence:
        """One choice of a request, behind what another engine made of it.

        Raises:
            GrammarError: the constraint does not compile.
        """
        params = request.sampling
        wanted = self._context_length if params.max_tokens is None else params.max_tokens
        eos_ids = frozenset() if params.ignore_eos else self._model.eos_ids
        self._count += 1
        sequence = Sequence(
            request=request,
            index=progress.index,
            arrival=self._count,
            tokens=list(request.prompt),
            sampler=SamplerState(
                params,
                request.prompt,
                self._model.tokenizer.vocab_size,
                choice_index=progress.index,
                eos_ids=sorted(self._model.eos_ids),
            ),
            grammar=None if params.grammar is None else self._start_grammar(params.grammar),
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            end=min(self._context_length, len(request.prompt) + wanted),
            submitted_s=self._clock(),
        )
        sequence.resume(progress)
        sequence.rank = self._order.key(sequence)
        return sequence

    def _start_grammar(self, grammar: Grammar) -> GrammarState:
        """Compile (or find) a constraint; the compiler is made on its first use."""
        if self._grammars is None:
            from coppice.engine.grammar import GrammarCompiler

            self._grammars = GrammarCompiler(self._model.tokenizer)
        return self._grammars.compile(grammar)
