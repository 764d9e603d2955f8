"""What a run showed: latencies, service by tenant, queue and pages over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coppice.scheduling.fairness import Accounts
from coppice.scheduling.interfaces import Planner
from coppice.scheduling.policy import Policy
from coppice.scheduling.virtual import (
    NO_PAUSES,
    Pauses,
    Sizes,
    StepTime,
    VirtualEngine,
    VirtualSequence,
    play,
)


class Moment(NamedTuple):
    """Gauges after one step."""

    time_s: float
    waiting: int
    running: int
    pages: int


class Answer(NamedTuple):
    """One request's course; times in seconds since the run began, 0 where it never came."""

    tenant: str
    submitted_s: float
    first_token_s: float
    ended_s: float
    prompt: int
    answer: int
    finished: bool
    tpot_wish_s: float | None = None

    @property
    def ttft(self) -> float:
        """Arrival to first token."""
        return self.first_token_s - self.submitted_s

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first."""
        return (self.ended_s - self.first_token_s) / max(1, self.answer - 1)

    @property
    def e2e(self) -> float:
        """Arrival to end."""
        return self.ended_s - self.submitted_s


@dataclass(slots=True)
class Record:
    """A run, live or simulated.

    Attributes:
        seconds: from the first arrival to the last end.
        last_arrival_s: when the last request came.
    """

    answers: list[Answer] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    accounts: Accounts = field(default_factory=Accounts)
    seconds: float = 0.0
    last_arrival_s: float = 0.0
    steps: int = 0
    preemptions: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Prompt and answer tokens of what finished, a second."""
        return sum(a.prompt + a.answer for a in self.answers if a.finished) / self.seconds


def spread(values: Iterable[float], parts: Sequence[float] = (50, 95, 99)) -> list[float]:
    """Percentiles by nearest rank; nan for no values."""
    ordered = sorted(values)
    if not ordered:
        return [float("nan")] * len(parts)
    last = len(ordered) - 1
    return [ordered[min(last, int(p / 100 * len(ordered)))] for p in parts]


def simulate(
    sequences: Sequence[VirtualSequence],
    step_time: StepTime,
    sizes: Sizes,
    policy: Policy | None = None,
    planner: Planner | None = None,
    *,
    pauses: Pauses = NO_PAUSES,
) -> Record:
    """Play sequences through a virtual engine and record what happens."""
    record = Record(last_arrival_s=max((s.submitted_s for s in sequences), default=0.0))
    accounts = record.accounts

    def on_token(sequence: VirtualSequence, now: float) -> None:
        if sequence.num_generated == 1:
            accounts.read(sequence.tenant, now, sequence.num_prompt)
        accounts.wrote(sequence.tenant, now)

    def each_step(engine: VirtualEngine) -> None:
        record.moments.append(
            Moment(engine.now, len(engine.waiting), len(engine.running), engine.pages.num_used)
        )

    for s in sequences:
        accounts.ask(s.tenant, s.submitted_s, s.num_prompt, s.num_answer)
    engine = VirtualEngine(step_time, sizes, policy, planner=planner, on_token=on_token)
    play(engine, sequences, each_step=each_step, pauses=pauses)
    record.answers = [
        Answer(
            s.tenant,
            s.submitted_s,
            s.first_token_s,
            s.ended_s,
            s.num_prompt,
            s.num_generated,
            s.fate == "finished",
            s.tpot_s,
        )
        for s in sequences
    ]
    first = min((s.submitted_s for s in sequences), default=0.0)
    record.seconds = max(engine.now - first, 1e-9)
    record.steps = engine.steps
    record.preemptions = engine.preemptions
    return record
