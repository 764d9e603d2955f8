"""What a planner sees, what it answers, and the eight hooks policies plug into.

A policy sees sequences only through `SequenceView` and time only as ``now``, so the same
object runs in the engine and on the simulator's virtual clock. A hook that decides something
has at most three methods; a policy that cannot run in the simulator has no place here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from coppice.scheduling.queue import FlowQueues

Rank = tuple[float, ...]
"""Place in a tenant's queue, smallest first; ends with the arrival number, so it is unique."""

Event = Literal["admitted", "generated", "ended"]


class SequenceView(Protocol):
    """The read-only side of an engine sequence.

    A sequence is merely behind on its token count: prefill, decode and recomputation after a
    preemption all close the gap between ``num_computed`` and ``num_tokens``.
    """

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted tokens."""
        ...

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt alone."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache when it was first admitted."""
        ...

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the sequence's pages."""
        ...

    @property
    def num_pages(self) -> int:
        """Pages the sequence holds."""
        ...

    @property
    def priority(self) -> int:
        """Lower runs first."""
        ...

    @property
    def arrival(self) -> int:
        """Order of submission; unique."""
        ...

    @property
    def submitted_s(self) -> float:
        """When it was submitted."""
        ...

    @property
    def first_token_s(self) -> float:
        """When its first token was accepted; 0 before that."""
        ...

    @property
    def first_tokens(self) -> int:
        """``num_tokens`` at that moment: more than the prompt's and one after a crash."""
        ...

    @property
    def tenant(self) -> str:
        """Whose share the work counts against."""
        ...

    @property
    def session(self) -> str:
        """The conversation of an agent it is a turn of; empty for none."""
        ...

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival within which the first token is wanted."""
        ...

    @property
    def tpot_s(self) -> float | None:
        """Seconds a later token is wanted in, on average since the first."""
        ...

    @property
    def accepted(self) -> int:
        """How many of its tokens were guessed ahead."""
        ...

    @property
    def rank(self) -> Rank:
        """`RequestOrder.key`, taken once at submission: a preempted sequence keeps its place."""
        ...

    @property
    def overtaken(self) -> int:
        """How often a later one of its tenant was admitted because this one did not fit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a plan may depend on.

    Attributes:
        running: sequences that hold pages, by rank.
        waiting: sequences that hold none, by tenant and rank; read only.
        now: seconds, on the clock the sequences' times are of.
        num_available: pages free now or after evicting cached prefixes.
        page_size: tokens a page.
        max_rows: rows one step may have.
        max_sequences: sequences that may run at once.
        prefill_chunk: most rows one sequence may get in a step.
        kept: of ``num_available``, pages worth more to sessions whose tool runs than to those
            that wait: while anything runs, nobody is admitted on them.
    """

    running: Sequence[SequenceView]
    waiting: FlowQueues
    now: float
    num_available: int
    page_size: int
    max_rows: int
    max_sequences: int
    prefill_chunk: int
    kept: int = 0


class Grant(NamedTuple):
    """``num_rows`` rows of the step go to ``sequence``."""

    sequence: SequenceView
    num_rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's decisions, carried out in the order of the fields.

    Attributes:
        preempt: lose their pages and wait again, in their old place.
        admit: take pages for their whole length.
        grants: rows, also of the newly admitted.
        overtaken: those passed over by the admitted, once for each that passed.
        why: why the first in turn was not admitted, for people: ``""`` when all were.
    """

    preempt: list[SequenceView] = field(default_factory=list)
    admit: list[SequenceView] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    overtaken: list[SequenceView] = field(default_factory=list)
    why: str = ""


class Planner(Protocol):
    """A pure function from snapshot to plan; may keep tuning state, never sequences."""

    def plan(self, snapshot: Snapshot) -> Plan:
        """Decide the next step."""
        ...


class CostModel(Protocol):
    """What a step takes."""

    def time(self, num_rows: int) -> float:
        """Expected seconds of a step of so many rows."""
        ...

    def rows_within(self, seconds: float, most: int) -> int:
        """Rows a step may have to end in time; 1 to ``most``."""
        ...


class Turns(Protocol):
    """Whose turn it is while one plan is made. Forgotten with the plan: planning is pure."""

    def tenant(self) -> str | None:
        """The tenant to admit from, or None when nobody may have a turn."""
        ...

    def took(self, sequence: SequenceView) -> None:
        """A tenant's sequence is in the plan."""
        ...

    def done(self, tenant: str) -> None:
        """The tenant has nothing left."""
        ...

    def may_jump(self, sequence: SequenceView) -> bool:
        """Whether a pressing deadline may go before the turns of others."""
        ...


class FlowOrder(Protocol):
    """Who is next among tenants. Counters change by `enqueue` and `charge` only."""

    def enqueue(self, tenant: str, backlogged: Mapping[str, object], last: str) -> None:
        """A tenant's queue stops being empty.

        Args:
            tenant: not yet among ``backlogged``.
            backlogged: tenants with queued work, running work not counted.
            last: the tenant whose queue ran empty last, or ``""``.
        """
        ...

    def charge(self, sequence: SequenceView, event: Event, tokens: int, now: float) -> None:
        """Work was done: ``tokens`` is the prompt's or the generated ones' number."""
        ...

    def turns(self, queues: FlowQueues, now: float) -> Turns:
        """Begin a plan."""
        ...


class RequestOrder(Protocol):
    """Who is next inside a tenant."""

    def key(self, sequence: SequenceView) -> Rank:
        """Its rank for good; waiting longer is told by the time it came, not by changing."""
        ...


class Admission(Protocol):
    """Which sessions may hold resources at all."""

    def gate(self, session: str) -> bool:
        """Whether a turn of the session may run now; one that was let in stays in."""
        ...

    def feedback(self, kv_pressure: float, cpu_pressure: float, now: float) -> None:
        """A turn ended or a session came. Loads between 0 and 1 (above: wanted but not there)."""
        ...

    def leave(self, session: str) -> None:
        """The session is over, or given up for lost; one that returns is gated anew."""
        ...


class Window(Protocol):
    """When deferrable work should run."""

    def bounds(self, deadlines: Sequence[float], now: float) -> tuple[float, float]:
        """``(frontrun, latest)`` of a batch of the work with these deadlines, ascending."""
        ...


class Retention(Protocol):
    """What becomes of the pages of a session that waits for a tool."""

    def on_pause(self, session: str, tool: str, pages: int, now: float) -> bool:
        """Whether to keep them for now."""
        ...

    def on_end(self, session: str, now: float, *, returned: bool) -> None:
        """The pause is over: the next turn came, or never will."""
        ...

    def rank(self, session: str, now: float) -> float:
        """Worth of keeping, seconds saved a second and page; the smallest goes first."""
        ...


class Partition(Protocol):
    """How a device is shared by a prefill and a decode lane."""

    def split(self, times: Callable[[int], tuple[float, float]], kv_used: float) -> int:
        """Units for prefill; the rest decodes.

        Args:
            times: seconds of the next prefill and the next decode step, by units for prefill.
            kv_used: share of KV pages in use.
        """
        ...


class Placement(Protocol):
    """Which replica or device runs what, at cluster level."""

    def route(self, free: Sequence[int]) -> int:
        """One of the free devices."""
        ...
