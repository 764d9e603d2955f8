"""Recorded agents on the real engine, in real time, with child processes as tools.

SWE-agent's sessions, all lengths a fifth, on the bundled model with KV for a part of them. A tool
is a child process that sleeps as long as the recorded tool ran; at most 16 run at once. Load 1 is
the rate at which the same engine with KV for everybody ends as many sessions that all come at
once. ``--order arrival`` (first come first served, the least recently used prefix out first) and
``--order sessions`` take turns; answers must be the same tokens.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections import deque
from dataclasses import asdict, replace

from benchmarks.agents.found import Found, mean_of
from benchmarks.live import warm_up
from benchmarks.report import Goal, Report
from benchmarks.workloads.agents import agents, swe_agent
from benchmarks.workloads.azure import text_tokens
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.scheduling.agents import Agent, Turn

SCALE = 5
SHARED_TOKENS = 800 // SCALE
PLACES = 16
KV_MIB, PLENTY_MIB = 28, 512
PLAIN = EngineConfig(order="arrival", kv_cache_mib=KV_MIB)
OURS = replace(PLAIN, order="sessions")
RULES = {"FCFS + LRU": PLAIN, "sessions": OURS}
LOADS = {0.2: 16, 1.0: 60}
"""Sessions by load."""
MOST_WAIT_S = 0.002


def measure(report: Report, *, quick: bool) -> None:
    """Both loads, the rules in alternation."""
    model = load_engine_model(PLAIN)
    top = LiveAgents(
        model, replace(PLAIN, kv_cache_mib=PLENTY_MIB), crowd(math.inf, LOADS[1.0])
    ).run()
    report.metrics["live: load 1, sessions/s"] = top.sessions_per_s
    runs: dict[tuple[float, str], list[Found]] = {(load, r): [] for load in LOADS for r in RULES}
    most_tools, alike = 0, True
    for turn in range(1 if quick else 3):
        for load, count in LOADS.items():
            answers = []
            for rule in list(RULES)[:: -1 if turn % 2 else 1]:
                live = LiveAgents(model, RULES[rule], crowd(load * top.sessions_per_s, count, turn))
                runs[load, rule].append(live.run())
                answers.append(live.tokens)
                most_tools = max(most_tools, live.most_tools)
            alike &= answers[0] == answers[1]
    found = {key: mean_of(each) for key, each in runs.items()}
    for (load, rule), f in found.items():
        report.rows.append(["SWE-agent / 5, live", f"{KV_MIB} MiB", f"{load:g}", rule, *f.row()])
    report.metrics["live"] = {
        f"load {load:g}, {rule}": list(map(asdict, each)) for (load, rule), each in runs.items()
    }
    report.goals += [
        *_goals(found),
        Goal.at_most("live: most tools at once over places", most_tools / PLACES, 1.0),
        Goal.at_least("live: the same tokens under both", float(alike), 1.0),
    ]


def _goals(found: dict[tuple[float, str], Found]) -> list[Goal]:
    plain, ours = RULES
    light, full = LOADS
    return [
        Goal.at_least(
            "live: mean session latency of FCFS + LRU over sessions' at saturation",
            found[full, plain].mean_s / found[full, ours].mean_s, 1.4,
        ),
        Goal.at_most(
            "live: the same inverted at 20% load",
            found[light, ours].mean_s / found[light, plain].mean_s, 1.02,
        ),
        Goal.at_least(
            "live: P95 of FCFS + LRU over sessions' at saturation",
            found[full, plain].p95_s / found[full, ours].p95_s, 1.2,
        ),
        Goal.at_least(
            "live: throughput over FCFS + LRU at saturation",
            found[full, ours].sessions_per_s / found[full, plain].sessions_per_s, 0.97,
        ),
        Goal.at_most(
            "live: preemptions a turn",
            max(f.preemptions_per_turn for (_, rule), f in found.items() if rule == ours), 0.1,
        ),
    ]  # fmt: skip


def crowd(rate: float, count: int, seed: int = 1) -> list[Agent]:
    """SWE-agent's sessions with all lengths scaled."""
    runs = [[_scaled(turn) for turn in turns] for turns in swe_agent()]
    return agents(runs, rate, count, shared_tokens=SHARED_TOKENS, seed=seed)


def _scaled(turn: Turn) -> Turn:
    return turn._replace(prompt=max(1, turn.prompt // SCALE), answer=max(2, turn.answer // SCALE))


class LiveAgents:
    """Plays agents on an engine of their own.

    Attributes:
        tokens: of each conversation, by agent.
        most_tools: that ran at once.
    """

    def __init__(self, model: EngineModel, config: EngineConfig, crowd: list[Agent]) -> None:
        self.engine = Engine(model, config)
        self._vocab = model.facts.vocab_size
        warm_up(self.engine, self._vocab)
        shared = text_tokens(SHARED_TOKENS, self._vocab, 0)
        self.tokens = [list(shared) for _ in crowd]
        self.most_tools = 0
        self._agents = crowd
        self._coming = deque(sorted(crowd, key=lambda agent: agent.begins_s))
        self._line: deque[Agent] = deque()
        self._tools: list[tuple[subprocess.Popen[bytes], Agent]] = []
        self._open = len(crowd)
        self._began_s = 0.0

    def run(self) -> Found:
        """Until every session has ended."""
        engine = self.engine
        pages, before = engine.pages, engine.stats()
        hit, asked = pages.hit_tokens, pages.queried_tokens
        self._began_s = time.monotonic()
        while self._open:
            self._poll()
            if not engine.has_work:
                engine.attend()
            if engine.has_work:
                self._step()
            else:
                time.sleep(MOST_WAIT_S)
        seconds = self._now
        engine.check_pages()
        found_tokens = (pages.hit_tokens - hit) / (pages.queried_tokens - asked)
        preemptions = engine.stats().preemptions - before.preemptions
        engine.close()
        return Found.of(self._agents, seconds, found_tokens, preemptions)

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began_s

    def _poll(self) -> None:
        """Send what is due: first turns, and those whose tool has ended."""
        while self._coming and self._coming[0].begins_s <= self._now:
            self._send(self._coming.popleft())
        for tool, agent in [each for each in self._tools if each[0].poll() is not None]:
            self._tools.remove((tool, agent))
            if tool.returncode:
                raise RuntimeError(f"a tool ended with {tool.returncode}")
            self._send(agent)
        while self._line and len(self._tools) < PLACES:
            agent = self._line.popleft()
            seconds = agent.turns[agent.at - 1].tool_s
            self._tools.append((subprocess.Popen(["sleep", f"{seconds:.3f}"]), agent))
        self.most_tools = max(self.most_tools, len(self._tools))

    def _send(self, agent: Agent) -> None:
        turn, tokens = agent.turns[agent.at], self.tokens[agent.index]
        new = turn.prompt - (0 if agent.at else SHARED_TOKENS)
        tokens += text_tokens(max(1, new), self._vocab, 1 + 100 * agent.index + agent.at)
        params = SamplingParams(max_tokens=turn.answer, temperature=0.0, ignore_eos=True, seed=1)
        self.engine.submit(
            Request(
                id=str(agent.index), prompt=list(tokens), sampling=params,
                session=agent.session, session_tool=turn.tool,
            )
        )  # fmt: skip

    def _step(self) -> None:
        for output in self.engine.step():
            agent = self._agents[int(output.request_id)]
            self.tokens[agent.index] += output.tokens
            if output.finish_reason is None:
                continue
            agent.at += 1
            if agent.at < len(agent.turns):
                self._line.append(agent)
                continue
            agent.ended_s = self._now
            self._open -= 1
            self.engine.sessions.end(agent.session, self.engine.clock())
