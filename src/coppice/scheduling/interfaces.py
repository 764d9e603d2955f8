"""What a planner sees and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


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
    def tenant(self) -> str:
        """Whose share the work counts against."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a plan may depend on.

    Attributes:
        running: sequences that hold pages, best first.
        waiting: sequences that hold none, best first.
        num_available: pages free now or after evicting cached prefixes.
        page_size: tokens a page.
        max_rows: rows one step may have.
        max_sequences: sequences that may run at once.
        prefill_chunk: most rows one sequence may get in a step.
    """

    running: Sequence[SequenceView]
    waiting: Sequence[SequenceView]
    num_available: int
    page_size: int
    max_rows: int
    max_sequences: int
    prefill_chunk: int


class Grant(NamedTuple):
    """``num_rows`` rows of the step go to ``sequence``."""

    sequence: SequenceView
    num_rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's decisions, carried out in the order of the fields."""

    preempt: list[SequenceView] = field(default_factory=list)
    admit: list[SequenceView] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)


class Planner(Protocol):
    """A pure function from snapshot to plan; may keep tuning state, never sequences."""

    def plan(self, snapshot: Snapshot) -> Plan:
        """Decide the next step."""
        ...
