"""Agents on the virtual clock: turn, tool, a turn whose prompt extends the last, and so on."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from coppice.scheduling.virtual import VirtualEngine, VirtualSequence

MOST_BLOCKS = 1 << 20
"""Block names an agent has for itself."""


class Turn(NamedTuple):
    """One turn and the tool after it.

    Attributes:
        prompt: tokens it adds to the conversation.
        answer: tokens it generates.
        tool: called after it; empty after the last.
        tool_s: seconds the tool takes once it runs.
        on_cpu: whether it needs a place to run: a person's answer does not.
    """

    prompt: int
    answer: int
    tool: str = ""
    tool_s: float = 0.0
    on_cpu: bool = True


@dataclass(slots=True, eq=False, kw_only=True)
class Agent:
    """A session and what became of it.

    Attributes:
        index: unique, from 0; its session is named after it.
        begins_s: when its first turn is sent.
        turns: with ``lost_after`` only the first so many are sent.
        shared: names a prompt prefix it has in common with others, from 0.
        shared_tokens: of that prefix.
        lost_after: turns after which nobody hears of it again.
        ended_s: when its last turn ended; 0 before.
        back_s: when the tool that runs ends: what an oracle knows.
    """

    index: int
    begins_s: float
    turns: Sequence[Turn]
    tenant: str = "default"
    shared: int = 0
    shared_tokens: int = 0
    lost_after: int | None = None
    ended_s: float = 0.0
    back_s: float = 0.0
    at: int = 0
    tokens: int = 0
    sequences: list[VirtualSequence] = field(default_factory=list)

    @property
    def session(self) -> str:
        """Its name in the engine."""
        return f"agent-{self.index}"

    @property
    def latency_s(self) -> float:
        """From its first turn sent to its last answered."""
        return self.ended_s - self.begins_s


class AgentDriver:
    """Plays agents against a virtual engine; their tools share a number of places.

    Args:
        engine: submits to it and ends its sessions.
        agents: in any order.
        places: tools that may run at once; others wait in line.
    """

    def __init__(self, engine: VirtualEngine, agents: Sequence[Agent], places: int = 8) -> None:
        self.engine = engine
        self.places = places
        self.busy = 0
        self.peak = 0
        self._line: deque[Agent] = deque()
        self._events: list[tuple[float, int, Callable[[Agent], None], Agent]] = []
        self._by_sequence: dict[int, Agent] = {}
        self._open = len(agents)
        self._sent = 0
        self._pushed = 0
        engine.on_end = self._turn_ended
        for agent in sorted(agents, key=lambda agent: agent.begins_s):
            self._at(agent.begins_s, self._send, agent)

    def run(self) -> None:
        """Until every agent has ended or is lost, and the engine has no work."""
        engine = self.engine
        while self._open or engine.has_work:
            while self._events and self._events[0][0] <= engine.now:
                _, _, happens, agent = heapq.heappop(self._events)
                happens(agent)
            engine.let_in()
            steps = engine.steps
            if engine.has_work and (engine.step() > 0 or engine.steps == steps):
                continue
            later = self._events[0][0] if self._events else inf
            engine.now = max(engine.now, min(later, engine.sessions.next_change_s()))

    def _at(self, time_s: float, happens: Callable[[Agent], None], agent: Agent) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (time_s, self._pushed, happens, agent))

    def _send(self, agent: Agent) -> None:
        turn = agent.turns[agent.at]
        agent.tokens += turn.prompt
        whole = agent.tokens + turn.answer
        per_block = self.engine.sizes.block_tokens
        shared = agent.shared_tokens // per_block
        private = (agent.index + 1) * MOST_BLOCKS
        common = -(agent.shared + 1) * MOST_BLOCKS
        sequence = VirtualSequence(
            arrival=self._sent,
            num_prompt=agent.tokens,
            num_answer=turn.answer,
            submitted_s=self.engine.now,
            tenant=agent.tenant,
            session=agent.session,
            tool=turn.tool,
            blocks=tuple(
                (common if i < shared else private) + i for i in range(whole // per_block)
            ),
        )
        self._sent += 1
        self._by_sequence[sequence.arrival] = agent
        agent.sequences.append(sequence)
        self.engine.submit(sequence)

    def _turn_ended(self, sequence: VirtualSequence, now: float) -> None:
        agent = self._by_sequence.pop(sequence.arrival, None)
        if agent is None:
            return
        turn = agent.turns[agent.at]
        agent.tokens += turn.answer
        agent.at += 1
        if sequence.fate != "finished" or agent.at == len(agent.turns):
            agent.ended_s = now
            self._open -= 1
            self.engine.end_session(agent.session)
        elif agent.at == agent.lost_after:
            self._open -= 1
        elif turn.on_cpu:
            self._line.append(agent)
            self._start_tools()
        else:
            agent.back_s = now + turn.tool_s
            self._at(agent.back_s, self._send, agent)
        self._tell()

    def _start_tools(self) -> None:
        while self._line and self.busy < self.places:
            agent = self._line.popleft()
            self.busy += 1
            agent.back_s = self.engine.now + agent.turns[agent.at - 1].tool_s
            self._at(agent.back_s, self._tool_ended, agent)
        self.peak = max(self.peak, self.busy)

    def _tool_ended(self, agent: Agent) -> None:
        self.busy -= 1
        self._start_tools()
        self._tell()
        self._send(agent)

    def _tell(self) -> None:
        self.engine.sessions.cpu_pressure = (self.busy + len(self._line)) / self.places
