"""Recorded agents in the simulator.

Sessions of tau-bench and SWE-agent arrive at random on the engine's planner over a virtual L20
that serves Llama-3 8B with KV for a part of them; tools share 16 places. Load 1 is the rate at
which the same engine with KV for everybody ends 600 sessions that all come at once. The plain one
is first come first served with the least recently used prefix out first. Means are over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

from benchmarks.agents.found import Found, mean_of
from benchmarks.report import Goal, Report
from benchmarks.workloads.agents import TAU_SYSTEM_TOKENS, agents, swe_agent, tau_bench
from coppice.scheduling.agents import Agent, AgentDriver, Turn
from coppice.scheduling.flows import InOrder
from coppice.scheduling.lanes import ModelWork
from coppice.scheduling.orders import BySessionService
from coppice.scheduling.partition import Device, Operator
from coppice.scheduling.policy import Policy
from coppice.scheduling.retention import AlwaysDrop, AlwaysKeep, ByHazard
from coppice.scheduling.virtual import Sizes, VirtualEngine
from coppice.scheduling.window import SessionWindow

WORK = ModelWork(
    flops_per_row=2 * 8.03e9, weight_bytes=16.1e9, flops_per_key=4 * 4096 * 32, kv_bytes=131_072
)
"""Llama-3 8B in bfloat16."""
L20 = Device(units=92, flops_per_s=84e12, bytes_per_s=7.3e11, launch_s=2e-3)
PAGE_SIZE = 32
PLACES = 16
PLENTY_GIB = 512.0
SETTINGS = (("tau-bench", 6.0), ("tau-bench", 10.0), ("SWE-agent", 12.0), ("SWE-agent", 16.0))
LOADS = (0.2, 0.7, 1.0)

Sessions = tuple[list[list[Turn]], int]
"""Runs, and the tokens of the prompt they share."""


class Oracle(ByHazard):
    """Knows when each tool ends."""

    def __init__(self, ends_s: dict[str, Agent]) -> None:
        super().__init__(rebuild_s)
        self._agents = ends_s

    def rank(self, session: str, now: float) -> float:
        """See `Retention`."""
        wait = self._waits.get(session)
        if wait is None:
            return 0.0
        rest_s = max(1e-3, self._agents[session].back_s - now)
        return self._rebuild_s(wait.pages) / wait.pages / rest_s


def _window() -> SessionWindow:
    return SessionWindow()


def _all(known: dict[str, Agent]) -> Policy:
    del known
    return Policy(InOrder(), BySessionService(), _window(), ByHazard(rebuild_s))


RULES: dict[str, Callable[[dict[str, Agent]], Policy]] = {
    "FCFS + LRU": lambda known: Policy(),
    "all three": _all,
    "order alone": lambda known: Policy(InOrder(), BySessionService()),
    "window alone": lambda known: Policy(admission=_window()),
    "retention alone": lambda known: Policy(retention=ByHazard(rebuild_s)),
    "window, always keep": lambda known: Policy(
        InOrder(), BySessionService(), _window(), AlwaysKeep()
    ),
    "window, always drop": lambda known: Policy(
        InOrder(), BySessionService(), _window(), AlwaysDrop()
    ),
    "window, oracle": lambda known: Policy(InOrder(), BySessionService(), _window(), Oracle(known)),
    "always keep alone": lambda known: Policy(retention=AlwaysKeep()),
    "oracle alone": lambda known: Policy(retention=Oracle(known)),
}
PLAIN, OURS = "FCFS + LRU", "all three"


def measure(report: Report, *, quick: bool) -> None:
    """Every setting under three loads; at the highest with each part alone."""
    seeds = range(1, 2 if quick else 4)
    found: dict[tuple[str, float, float, str], Found] = {}
    for name, gib in SETTINGS:
        sessions = (tau_bench(), TAU_SYSTEM_TOKENS) if name == "tau-bench" else (swe_agent(), 800)
        top = simulate(sessions, math.inf, PLENTY_GIB, PLAIN, count=600).sessions_per_s
        report.metrics[f"load 1 of {name}, sessions/s"] = top
        for load in LOADS:
            for rule in RULES if load == LOADS[-1] else (PLAIN, OURS):
                f = mean_of([simulate(sessions, load * top, gib, rule, seed=i) for i in seeds])
                found[name, gib, load, rule] = f
                report.rows.append([name, f"{gib:g} GiB", f"{load:g}", rule, *f.row()])
    report.metrics["runs"] = {
        f"{name}, {gib:g} GiB, load {load:g}, {rule}": asdict(f)
        for (name, gib, load, rule), f in found.items()
    }
    report.goals += goals(found)


def goals(found: dict[tuple[str, float, float, str], Found]) -> list[Goal]:
    """The issue's figures, each the worst of all settings."""

    def ratios(load: float, over: str, under: str) -> list[float]:
        return [
            found[*setting, load, over].mean_s / found[*setting, load, under].mean_s
            for setting in SETTINGS
        ]

    light, full = LOADS[0], LOADS[-1]
    throughput = [
        found[*s, full, OURS].sessions_per_s / found[*s, full, PLAIN].sessions_per_s
        for s in SETTINGS
    ]
    return [
        Goal.at_least(
            "mean session latency of FCFS + LRU over all three at saturation",
            min(ratios(full, PLAIN, OURS)), 1.4,
        ),
        Goal.at_most("the same inverted at 20% load", max(ratios(light, OURS, PLAIN)), 1.02),
        Goal.at_least("throughput over FCFS + LRU at saturation", min(throughput), 0.97),
        Goal.at_most(
            "retention over the oracle's mean latency", max(ratios(full, OURS, "window, oracle")),
            1.1,
        ),
        Goal.at_most(
            "retention over the oracle's, without window and order",
            max(ratios(full, "retention alone", "oracle alone")), 1.1,
        ),
        Goal.at_least(
            "always keep over retention", min(ratios(full, "window, always keep", OURS)), 1.0
        ),
        Goal.at_least(
            "always keep over retention, without window and order",
            min(ratios(full, "always keep alone", "retention alone")), 1.0,
        ),
        Goal.at_least(
            "always drop over retention", min(ratios(full, "window, always drop", OURS)), 1.0
        ),
        Goal.at_most(
            "preemptions a turn",
            max(f.preemptions_per_turn for k, f in found.items() if k[3] == OURS), 0.1,
        ),
    ]  # fmt: skip


def simulate(
    sessions: Sessions, rate: float, gib: float, rule: str, *, count: int = 300, seed: int = 1
) -> Found:
    """One run at a rate of arrivals a second."""
    runs, shared = sessions
    crowd = agents(runs, rate, count, shared_tokens=shared, seed=seed)
    sizes = Sizes(
        num_pages=int(gib * 2**30 / WORK.kv_bytes / PAGE_SIZE), page_size=PAGE_SIZE, max_rows=512,
        prefill_chunk=512, max_sequences=64, block_tokens=PAGE_SIZE,
    )  # fmt: skip
    engine = VirtualEngine(step_s, sizes, RULES[rule]({agent.session: agent for agent in crowd}))
    AgentDriver(engine, crowd, PLACES).run()
    engine.pages.check(engine.running)
    pages = engine.pages
    found_tokens = pages.hit_tokens / pages.queried_tokens
    return Found.of(crowd, engine.now, found_tokens, engine.preemptions)


def step_s(rows: int, keys: int, sequences: int) -> float:
    """A step's seconds on the whole device; every sequence's KV is read once."""
    if not rows:
        return 0.0
    work = [
        Operator(WORK.flops_per_row * rows, WORK.weight_bytes),
        Operator(WORK.flops_per_key * keys, WORK.kv_bytes * keys / rows * sequences, 0.6, 0.5),
    ]
    return L20.time(work, L20.units)


def rebuild_s(pages: int) -> float:
    """Arithmetic of so many pages' tokens."""
    tokens = pages * PAGE_SIZE
    return (WORK.flops_per_row * tokens + WORK.flops_per_key * tokens**2 / 2) / L20.flops_per_s
