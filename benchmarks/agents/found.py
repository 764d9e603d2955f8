"""What came of a run of agents, simulated or live."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from coppice.scheduling.agents import Agent


@dataclass(frozen=True)
class Found:
    """One run. Seconds, sessions a second, shares."""

    mean_s: float
    p95_s: float
    sessions_per_s: float
    found_tokens: float
    preemptions_per_turn: float

    @classmethod
    def of(
        cls, agents: Sequence[Agent], seconds: float, found_tokens: float, preemptions: int
    ) -> Found:
        """Of agents that have all ended."""
        latencies = [agent.latency_s for agent in agents]
        return cls(
            statistics.mean(latencies),
            statistics.quantiles(latencies, n=20)[-1],
            len(agents) / seconds,
            found_tokens,
            preemptions / sum(len(agent.turns) for agent in agents),
        )

    def row(self) -> list[str]:
        """For a table."""
        return [
            f"{self.mean_s:.1f}", f"{self.p95_s:.1f}", f"{self.sessions_per_s:.3f}",
            f"{self.found_tokens:.2f}",
        ]  # fmt: skip


def mean_of(runs: Sequence[Found]) -> Found:
    """Field by field."""
    return Found(*map(statistics.mean, zip(*map(astuple, runs), strict=True)))
