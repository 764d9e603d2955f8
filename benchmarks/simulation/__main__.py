"""``python -m benchmarks.simulation [--quick]``: the simulator's error on this machine.

Two traces, Azure's conversations (lengths divided by 4) and VTC's clients, each played live and
on the virtual clock with step times measured just before and just after, because a shared
machine's speed drifts (``drift`` is the second over the first). A live run in which that was more
than a tenth is played again, at most twice, whatever came of it. Arrivals are paced to bring
`BUSY` of the tokens a second that the simulator says can be done here: nearer to all of them a
queue stands, and a tenth of the machine's speed is several times as much of the waiting.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.live import replay, sizes_of
from benchmarks.quiet import wait_until_quiet
from benchmarks.report import Goal, Report
from benchmarks.steps import Steps, between, measured_steps
from benchmarks.workloads.azure import DATA
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.scheduling.record import Record, simulate, spread
from coppice.scheduling.traces import as_sequences, read_trace
from coppice.scheduling.virtual import Sizes, VirtualSequence

CONFIG = EngineConfig(kv_cache_mib=64, max_sequences=32)
TRACES = {
    "azure conv": ("azure_llm_2023/conv.csv.gz", 4.0),
    "vtc": ("vtc_fairness/arena_clients.csv", 1.0),
}
"""File, divisor of lengths."""
BUSY = 0.6
MOST_DRIFT, TRIES = 0.1, 3


def main() -> int:
    """Both traces; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.simulation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    args = parser.parse_args()
    report = Report("simulation", ["trace", "run", "tok/s", "TTFT p50 ms", "p95 ms", "seconds"])
    model = load_engine_model(CONFIG)
    report.metrics["quiet"] = wait_until_quiet()
    steps = measured_steps(model, CONFIG)
    engine = Engine(model, CONFIG)
    num_pages, context = engine.num_pages, engine.context_length
    sizes = sizes_of(num_pages, CONFIG)
    for name, (file, divide) in TRACES.items():
        arrivals = read_trace(DATA / file)[: 60 if args.quick else 300]
        sequences = partial(as_sequences, arrivals, divide=divide, max_context=context)
        pace = BUSY * _most_paced(sequences, steps, sizes)
        sequences = partial(sequences, pace=pace)
        tries, drift = 0, {"none yet": math.inf}
        while tries < TRIES and any(abs(ratio - 1) > MOST_DRIFT for ratio in drift.values()):
            tries, before = tries + 1, steps
            live = replay(model, CONFIG, sequences())
            steps = measured_steps(model, CONFIG)
            drift = _drift(before, steps)
        step_time, pauses = between(before, steps)
        virtual = simulate(sequences(), step_time, sizes, pauses=pauses)
        report.metrics[name] = {
            "pace": pace, "drift": drift, "tries": tries, **steps.metrics()
        }  # fmt: skip
        _compare(report, name, live, virtual)
    return report.finish()


def _most_paced(
    sequences: Callable[..., list[VirtualSequence]], steps: Steps, sizes: Sizes
) -> float:
    """The pace at which a trace brings as many tokens as are done when all come at once."""
    at_once = simulate(sequences(pace=1e6), steps.time, sizes).seconds
    return max(s.submitted_s for s in sequences(pace=1.0)) / at_once


def _drift(before: Steps, after: Steps) -> dict[str, float]:
    """How much longer steps take in the second measurement."""
    sizes = {"decode of 8": (8, 8 * 256, 8), "prompt of 256": (256, 256 * 128, 1)}
    return {name: after.time(*size) / before.time(*size) for name, size in sizes.items()}


def _compare(report: Report, name: str, live: Record, virtual: Record) -> None:
    for label, record in (("live", live), ("simulated", virtual)):
        p50, p95 = spread((a.ttft * 1e3 for a in record.answers), (50, 95))
        report.rows.append(
            [name, label, f"{record.tokens_per_s:.0f}", f"{p50:.1f}", f"{p95:.1f}",
             f"{record.seconds:.1f}"]
        )  # fmt: skip
    measures: list[tuple[str, float, Callable[[Record], float]]] = [
        ("throughput", 0.10, lambda r: r.tokens_per_s),
        ("p50 TTFT", 0.15, lambda r: spread((a.ttft for a in r.answers), (50,))[0]),
        ("p95 TTFT", 0.15, lambda r: spread((a.ttft for a in r.answers), (95,))[0]),
    ]
    for what, bound, measure in measures:
        error = abs(measure(virtual) / measure(live) - 1)
        report.goals.append(Goal.at_most(f"{name}: error of {what}", error, bound))


if __name__ == "__main__":
    sys.exit(main())
