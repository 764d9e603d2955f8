"""One token stream of a request, and what the engine knows about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coppice.cache import Node
from coppice.engine.messages import FinishReason, Progress, TokenLogprob
from coppice.engine.request import Request
from coppice.engine.sampler import SamplerState
from coppice.kernels.sampling import RowParams

if TYPE_CHECKING:
    from coppice.engine.grammar_state import GrammarState


@dataclass(slots=True, eq=False)
class Sequence:
    """A choice of a request: its tokens, how many of them have KV, and in which pages.

    Implements `coppice.scheduling.SequenceView` and `coppice.speculation.DraftView`.

    Attributes:
        index: which of the request's ``n`` choices.
        arrival: order of submission over all sequences; unique.
        tokens: prompt, then accepted tokens.
        num_computed: leading tokens whose KV is in ``pages``.
        node: cursor into the prefix tree after ``num_sealed`` sealed pages.
        slot: row of the step's page table while running, else -1.
        stop_ids: tokens that end the sequence.
        end: number of tokens at which it is full.
        sent: tokens already reported to the front end.
        logprobs: of the others.
        rank: place in its tenant's queue, for good.
        overtaken: admissions of later ones because this one did not fit.
        reached: most tokens it ever had KV of; computing those again is recomputation.
        drafted: tokens guessed ahead in all its steps, and ``accepted`` of them.
    """

    request: Request
    index: int
    arrival: int
    tokens: list[int]
    sampler: SamplerState
    grammar: GrammarState | None
    stop_ids: frozenset[int]
    end: int
    submitted_s: float
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    node: Node | None = None
    num_sealed: int = 0
    slot: int = -1
    parked: bool = False
    cached_tokens: int = 0
    sent: int = 0
    drafted: int = 0
    accepted: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: tuple[str, str] | None = None
    rank: tuple[float, ...] = ()
    overtaken: int = 0
    reached: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    first_tokens: int = 0

    def __post_init__(self) -> None:
        self.sent = len(self.request.prompt)

    def resume(self, progress: Progress) -> None:
        """Stand where an earlier engine process stood after these tokens.

        Noise depends on positions only, so nothing else is needed to go on alike.

        Raises:
            GrammarError: a token is not allowed where it stands; a bug, or another grammar.
        """
        for token in progress.tokens:
            self.sampler.accept(token)
            if self.grammar is not None:
                self.grammar.accept(token)
        self.tokens += progress.tokens
        self.sent = len(self.tokens)
        self.drafted, self.accepted = progress.drafted, progress.accepted

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted tokens."""
        return len(self.tokens)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def session(self) -> str:
        """The agent's conversation it is a turn of."""
        return self.request.session

    @property
    def ttft_s(self) -> float | None:
        """Seconds within which the first token is wanted."""
        return self.request.ttft_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a later token is wanted in."""
        return self.request.tpot_s

    @property
    def num_generated(self) -> int:
        """Accepted tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pages(self) -> int:
        """Pages held."""
        return len(self.pages)

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return self.end - len(self.tokens)

    @property
    def row(self) -> RowParams:
        """Sampling parameters in the form kernels read."""
        return self.sampler.row

    @property
    def priority(self) -> int:
        """Lower runs first."""
        return self.request.priority

    @property
    def tenant(self) -> str:
        """Whose share the work counts against."""
        return self.request.tenant

    @property
    def scope(self) -> str:
        """Tenant and cache salt: whose earlier answers may help to guess ahead."""
        return f"{self.request.tenant}\n{self.request.cache_salt}"

    @property
    def speculate(self) -> str:
        """Name of the only proposer wanted, ``auto`` or ``off``."""
        return self.request.speculate
