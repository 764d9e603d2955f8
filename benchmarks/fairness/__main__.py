"""``python -m benchmarks.fairness``: fair shares, live, simulated, and beside llama.cpp.

Options: ``--part trace|peer|simulated|greedy`` runs one part, ``--quick`` one round. Live,
the trace takes some seven minutes, the peer six, the greedy tenant four.

The trace is the authors' public one, all of it, played ten times as fast into the bundled model,
which overloads it as the paper's A10G was; windows are scaled alike (60 s become 6 s). Live runs
of the policies alternate, each figure is the median over the rounds. ``peer`` plays it into
llama.cpp's server. Nine polite tenants ask for two thirds of what the machine can do, a greedy one
for ten times what each of them does; "solo" is the nine without it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from benchmarks.fairness.llama_server import replay_llama
from benchmarks.live import replay, sizes_of
from benchmarks.report import Goal, Report
from benchmarks.steps import measured_steps
from benchmarks.workloads.azure import DATA
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.scheduling import Policy, make_policy
from coppice.scheduling.fairness import Differences, service_differences
from coppice.scheduling.flows import FairCounters, InOrder
from coppice.scheduling.policy import PolicyName
from coppice.scheduling.record import Record, simulate
from coppice.scheduling.traces import as_sequences, read_trace
from coppice.scheduling.virtual import (
    Sizes,
    StepTime,
    VirtualEngine,
    VirtualSequence,
    play,
)

PACE = 10.0
CONFIG = EngineConfig(kv_cache_mib=64, max_sequences=32)
GREEDY_CONFIG = EngineConfig(kv_cache_mib=64, max_sequences=16)
POLITE_SHARE = 2 / 3
"""Of what the machine can do, asked for by the nine: none of them more than a tenth."""
SHORTEST, LONGEST = 20, 200
MEAN_TOKENS = SHORTEST + LONGEST
"""Of a prompt and its answer, each between those."""
TRACE = DATA / "vtc_fairness" / "arena_clients.csv"
SEEDS = 20
HALF_S = 200.0
"""Of the trace: in its first half arrivals overload the engine less."""
PARTS = ("trace", "peer", "simulated", "greedy")


def main() -> int:
    """All parts; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.fairness", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of live runs")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    name = "fairness" if len(parts) == len(PARTS) else f"fairness-{'-'.join(parts)}"
    report = Report(name, ["run", "policy", "max diff", "mean diff", "tok/s", "seconds"])
    model = load_engine_model(CONFIG)
    num_pages = Engine(model, CONFIG).num_pages
    arrivals = read_trace(TRACE)

    def trace(until_s: float = math.inf) -> list[VirtualSequence]:
        return as_sequences([a for a in arrivals if a.time_s < until_s], pace=PACE)

    if {"simulated", "greedy"} & set(parts):
        steps = measured_steps(model, CONFIG)
        step_time = steps.time
        report.metrics["steps"] = steps.metrics()
    if "simulated" in parts:
        _simulated_trace(report, trace, step_time, num_pages)
        _bound_goal(report, step_time)
    if "trace" in parts:
        _live_trace(report, model, trace, quick=args.quick)
    if "peer" in parts:
        _peer_trace(report, trace())
    if "greedy" in parts:
        _greedy(report, step_time, num_pages)
    return report.finish()


def _simulated_trace(
    report: Report,
    trace: Callable[[float], list[VirtualSequence]],
    step_time: StepTime,
    num_pages: int,
) -> None:
    """The trace under every policy on the virtual clock, and its first half under two."""
    for run, until_s, names in (
        ("simulated", math.inf, get_args(PolicyName)),
        ("simulated, first half", HALF_S, ("fcfs", "fair")),
    ):
        for name in names:
            policy = make_policy(name, limit=2, pool_tokens=num_pages * 32)
            sizes = sizes_of(num_pages, CONFIG)
            _row(report, run, name, simulate(trace(until_s), step_time, sizes, policy))
        fcfs, fair = (report.metrics[f"{run} {name}"][0] for name in ("fcfs", "fair"))
        for label, what in (("maximum", "most"), ("average", "mean")):
            name = f"{label} service difference, fair over FCFS, {run}"
            report.goals.append(Goal.at_most(name, fair[what] / fcfs[what], 0.6))


def _live_trace(
    report: Report,
    model: EngineModel,
    trace: Callable[[], list[VirtualSequence]],
    *,
    quick: bool,
) -> None:
    """The trace in the real engine, the policies in alternation."""
    live: dict[str, list[Record]] = {"fcfs": [], "fair": []}
    order: list[PolicyName] = ["fcfs", "fair"] if quick else ["fcfs", "fair", "fair", "fcfs"]
    for policy_name in order:
        record = replay(model, CONFIG, trace(), policy=make_policy(policy_name))
        live[policy_name].append(record)
        _row(report, "live", policy_name, record)
    _trace_goals(report, live)


def _peer_trace(report: Report, trace: list[VirtualSequence]) -> None:
    """The trace in llama.cpp's server, which knows no tenants."""
    try:
        _row(report, "live", "llama.cpp server", replay_llama(trace, CONFIG))
    except FileNotFoundError as error:
        report.metrics["llama_server"] = f"not run: {error}"


def _differences(record: Record) -> Differences:
    return service_differences(
        record.accounts, window_s=60 / PACE, every_s=5 / PACE, until_s=record.last_arrival_s
    )


def _row(report: Report, run: str, name: str, record: Record) -> None:
    found = _differences(record)
    report.rows.append(
        [
            run,
            name,
            f"{found.most:.0f}",
            f"{found.mean:.0f}",
            f"{record.tokens_per_s:.0f}",
            f"{record.seconds:.1f}",
        ]
    )
    report.metrics.setdefault(f"{run} {name}", []).append(
        {"most": found.most, "mean": found.mean, "tok_s": record.tokens_per_s}
    )


def _trace_goals(report: Report, live: dict[str, list[Record]]) -> None:
    def middle(name: str, what: str) -> float:
        records = live[name]
        if what == "tok_s":
            return statistics.median(r.tokens_per_s for r in records)
        return statistics.median(getattr(_differences(r), what) for r in records)

    for what in ("most", "mean"):
        ratio = middle("fair", what) / middle("fcfs", what)
        label = "maximum" if what == "most" else "average"
        report.goals.append(Goal.at_most(f"{label} service difference, fair over FCFS", ratio, 0.6))
    throughput = middle("fair", "tok_s") / middle("fcfs", "tok_s")
    report.goals.append(Goal.at_least("throughput, fair over FCFS", throughput, 0.99))


def _bound_goal(report: Report, step_time: StepTime) -> None:
    """The widest difference of two backlogged tenants over the bound, over seeds."""
    sizes = Sizes(num_pages=312, page_size=32, max_sequences=256, prefix_cache=False)
    pool = sizes.num_pages * sizes.page_size
    bound = 2 * max(500, 2 * pool)
    widest = max(_widest(FairCounters(), step_time, sizes, seed) for seed in range(SEEDS))
    plain = max(_widest(InOrder(), step_time, sizes, seed) for seed in range(3))
    report.metrics["2U"] = {"bound": bound, "fair": widest, "fcfs": plain, "seeds": SEEDS}
    report.goals.append(Goal.at_most("widest backlogged difference over 2U", widest / bound, 1.0))


def _widest(flows: FairCounters | InOrder, step_time: StepTime, sizes: Sizes, seed: int) -> float:
    rng = random.Random(seed)
    load = []
    for i in range(rng.randint(2, 8)):
        rate = rng.choice((1.0, 4.0, 16.0)) * (4 if i == 0 else 1)
        load += _poisson(f"t{i}", rate, 25.0, rng, longest=500)
    sequences = _numbered(load)
    served = dict.fromkeys({s.tenant for s in sequences}, 0.0)
    since: dict[tuple[str, str], float] = {}
    seen: set[int] = set()
    widest = 0.0

    def on_token(sequence: VirtualSequence, now: float) -> None:
        del now
        served[sequence.tenant] += 2.0

    def look(engine: VirtualEngine) -> None:
        nonlocal widest
        for s in engine.running:
            if s.arrival not in seen:
                seen.add(s.arrival)
                served[s.tenant] += s.num_prompt
        queued = engine.waiting.tenants
        for a in served:
            for b in served:
                if a < b and a in queued and b in queued:
                    gap = served[a] - served[b]
                    widest = max(widest, abs(gap - since.setdefault((a, b), gap)))
                else:
                    since.pop((a, b), None)

    engine = VirtualEngine(step_time, sizes, Policy(flows), on_token=on_token)
    play(engine, sequences, each_step=look, until_s=25.0)
    return widest


def _greedy(report: Report, step_time: StepTime, num_pages: int) -> None:
    """Nine polite tenants alone and beside one that asks ten times as much, live and simulated."""
    model = load_engine_model(GREEDY_CONFIG)
    sizes = sizes_of(num_pages, GREEDY_CONFIG)
    crowd = _greedy_load(4.0, 10.0, seconds=4.0)
    full = replay(model, GREEDY_CONFIG, crowd, policy=make_policy("fcfs")).tokens_per_s
    rate = POLITE_SHARE * full / (9 * MEAN_TOKENS)
    report.metrics["greedy"] = {"tokens_per_s": full, "requests_per_s_of_each": rate}
    runs: list[tuple[str, float, PolicyName]] = [
        ("nine alone", 0.0, "isolated"),
        ("and a greedy one", 10.0, "fair"),
        ("and a greedy one", 10.0, "isolated"),
    ]
    means: dict[tuple[str, str, str], float] = {}
    for label, greed, name in runs:
        simulated = simulate(
            _greedy_load(rate, greed), step_time, sizes, make_policy(name)
        )  # fmt: skip
        record = replay(model, GREEDY_CONFIG, _greedy_load(rate, greed), policy=make_policy(name))
        for run, found in (("simulated", simulated), ("live", record)):
            means[run, label, name] = _polite_row(report, (run, name, label), found)
    for run in ("live", "simulated"):
        solo = means[run, "nine alone", "isolated"]
        ratio = means[run, "and a greedy one", "isolated"] / solo
        report.goals.append(
            Goal.at_most(f"latency of nine beside a greedy tenant over solo, {run}", ratio, 1.10)
        )

    try:
        alone, beside = (
            _polite_row(
                report,
                ("live", "llama.cpp server", label),
                replay_llama(_greedy_load(rate, greed), GREEDY_CONFIG),
            )
            for label, greed in (("nine alone", 0.0), ("and a greedy one", 10.0))
        )
        report.metrics["greedy over solo, llama.cpp server"] = beside / alone
    except FileNotFoundError as error:
        report.metrics["llama_server"] = f"not run: {error}"


def _polite_row(report: Report, name: tuple[str, str, str], record: Record) -> float:
    """Mean latency of the polite tenants in a run, in seconds."""
    run, policy, label = name
    mean = statistics.mean(a.e2e for a in record.answers if a.tenant != "greedy")
    report.rows.append(
        [run, policy, f"{label}: polite e2e {mean * 1e3:.0f} ms", "",
         f"{record.tokens_per_s:.0f}", f"{record.seconds:.1f}"]
    )  # fmt: skip
    report.metrics[f"greedy {run} {policy} {label}"] = mean
    return mean


def _greedy_load(rate: float, greed: float, seconds: float = 15.0) -> list[VirtualSequence]:
    load: list[VirtualSequence] = []
    for i in range(9):
        load += _poisson(f"t{i}", rate, seconds, random.Random(100 + i), longest=LONGEST)
    if greed:
        load += _poisson("greedy", rate * greed, seconds, random.Random(109), longest=LONGEST)
    return _numbered(load)


def _poisson(
    tenant: str, rate: float, seconds: float, rng: random.Random, *, longest: int
) -> list[VirtualSequence]:
    found = []
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        found.append(
            VirtualSequence(
                arrival=0,
                num_prompt=rng.randint(SHORTEST, longest),
                num_answer=rng.randint(SHORTEST, longest),
                submitted_s=now,
                tenant=tenant,
            )
        )
    return found


def _numbered(load: Sequence[VirtualSequence]) -> list[VirtualSequence]:
    ordered = sorted(load, key=lambda s: s.submitted_s)
    for number, sequence in enumerate(ordered):
        sequence.arrival = number
    return ordered


if __name__ == "__main__":
    sys.exit(main())
