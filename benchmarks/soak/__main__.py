"""``python -m benchmarks.soak``: 45 minutes at 0.8 of the capacity measured first.

Requests have lengths of the Azure conversation trace; some are constrained, some ask for
several answers with log-probabilities, some leave midway. Every so often the load pauses until
the server is idle: then pages, places and descriptors are counted and memory is read.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from benchmarks.load.client import Ask, Told, conversation, make_ask, percentile, send
from benchmarks.load.shapes import anonymous_mib, capacity, fill_pages
from benchmarks.load.subjects import Coppice
from benchmarks.report import Goal, Report
from benchmarks.scorecard.subjects import Running
from benchmarks.soak.slope import Slope, slope_per_hour

FACTOR, PAUSES = 0.8, 30
LEAVE_SHARE, RICH_SHARE, SHAPED_SHARE = 0.08, 0.05, 0.04
WARM_UP_SHARE = 0.25
DRIFT, SLOPE_MIB_H = 0.05, 1.0
REST_S = 3.0
"""An idle moment begins so long after the last answer."""


@dataclass(frozen=True)
class Pause:
    """What is seen at an idle moment.

    Attributes:
        at_s: since the load began.
        http_mib, engine_mib: memory of each process that no file stands behind.
        files: descriptors of both.
        lost: what should be zero and is not.
    """

    at_s: float
    http_mib: float
    engine_mib: float
    files: int
    lost: dict[str, Any]


def mixed(seed: int) -> Iterator[tuple[Ask, int]]:
    """Requests without end, each with the events after which its client leaves (0: never)."""
    rng = random.Random(seed)
    for number, ask in enumerate(conversation(10**7, seed=seed)):
        kind = rng.random()
        if kind < LEAVE_SHARE:
            yield ask, rng.randint(1, 20)
        elif kind < LEAVE_SHARE + RICH_SHARE:
            yield make_ask(60, 32, number, n=2, logprobs=5), 0
        elif kind < LEAVE_SHARE + RICH_SHARE + SHAPED_SHARE:
            pattern = f"(yes|no|perhaps{number % 50}, ){{4,8}}"
            yield make_ask(40, 64, number, regex=pattern, ignore_eos=False), 0
        else:
            yield ask, 0


async def segment(
    port: int, asks: Iterator[tuple[Ask, int]], rate: float, seconds: float, rng: random.Random
) -> list[Told]:
    """Poisson arrivals for so long; returns when all have ended."""
    sending, at = [], time.monotonic()
    until = at + seconds
    while (at := at + rng.expovariate(rate)) < until:
        ask, leave_after = next(asks)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        sending.append(asyncio.create_task(send(port, ask, leave_after=leave_after)))
    return list(await asyncio.gather(*sending))


def pause(server: Running, began: float) -> Pause:
    """Wait for idleness and look."""
    url, deadline = f"http://127.0.0.1:{server.port}/v1/coppice/info", time.monotonic() + 30
    while True:
        info = httpx.get(url).json()
        outcomes, engine = info["outcomes"], info["engine"]
        idle = not outcomes["in_flight"] and not engine["running"] + engine["waiting"]
        if idle or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    time.sleep(REST_S)  # closed connections and freed memory go after the last answer
    ended = sum(outcomes[name] for name in outcomes if name not in ("accepted", "in_flight"))
    lost = {
        "pages": engine["pages_used"], "in_flight": outcomes["in_flight"],
        "calls": outcomes["accepted"] - ended - outcomes["in_flight"], **info["promised"],
    }  # fmt: skip
    engine_pid = info["engine_pid"]
    engine_mib = anonymous_mib([psutil.Process(engine_pid)])
    http = [process for process in server.family() if process.pid != engine_pid]
    files = sum(process.num_fds() for process in server.family())
    lost = {name: count for name, count in lost.items() if count}
    return Pause(time.monotonic() - began, anonymous_mib(http), engine_mib, files, lost)


def main() -> int:
    """Run it and judge."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    seconds, rng = 60 * args.minutes, random.Random(args.seed)
    with Running(Coppice()) as server:
        fill_pages(server)
        at_capacity = capacity(server, min(20.0, max(4.0, seconds / 20)))
        asks, told, pauses = mixed(args.seed), [], []
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            rate = FACTOR * at_capacity
            told += asyncio.run(segment(server.port, asks, rate, seconds / PAUSES, rng))
            pauses.append(pause(server, began))
            print(f"{pauses[-1]}", flush=True)
    report = Report("soak", ["", "value"])
    judge(report, at_capacity, told, pauses, began + WARM_UP_SHARE * seconds)
    return report.finish()


def judge(
    report: Report, at_capacity: float, told: list[Told], pauses: list[Pause], warm_s: float
) -> None:
    """Rows and goals."""
    endings = Counter(t.ending for t in told)
    late = [p for p in pauses if p.at_s >= WARM_UP_SHARE * pauses[-1].at_s]
    slopes = {
        name: slope_per_hour([p.at_s for p in late], [getattr(p, f"{name}_mib") for p in late])
        for name in ("http", "engine")
    }
    both = slope_per_hour([p.at_s for p in late], [p.http_mib + p.engine_mib for p in late])
    drift = {
        name: _drift([t for t in told if t.sent_s >= warm_s], name) for name in ("ttft_s", "tpot_s")
    }
    files = [p.files for p in late]
    rows = {
        "capacity": f"{at_capacity:.2f} good requests/s",
        "requests": f"{len(told)}: {dict(endings)}",
        "memory, front end": _shown(slopes["http"]), "memory, engine": _shown(slopes["engine"]),
        "memory, together": _shown(both), "descriptors": f"{min(files)} to {max(files)}",
        "p99 of TTFT": f"{100 * drift['ttft_s']:+.1f}%, last third against first",
        "p99 of TPOT": f"{100 * drift['tpot_s']:+.1f}%",
    }  # fmt: skip
    report.rows = [[name, value] for name, value in rows.items()]
    report.metrics = {
        "minutes": pauses[-1].at_s / 60, "capacity": at_capacity, "endings": dict(endings),
        "slope_mib_h": both.per_hour, "slope_uncertainty_mib_h": both.uncertainty,
        "least_squares_mib_h": both.least_squares,
        "http_mib_h": slopes["http"].per_hour, "engine_mib_h": slopes["engine"].per_hour,
        "drift": drift, "memory": [[p.at_s, p.http_mib, p.engine_mib] for p in pauses],
        "descriptors": [min(files), max(files)],
        "why": [t.why for t in told if t.ending == "failed"][:5],
    }  # fmt: skip
    report.goals = [
        Goal.at_most("soak.memory_slope_mib_h", both.per_hour, SLOPE_MIB_H),
        Goal.at_most("soak.lost_at_idle", sum(bool(p.lost) for p in pauses), 0),
        Goal.at_most("soak.descriptors_growth", max(files) - files[0], 0),
        Goal.at_most("soak.failed", endings["failed"], 0),
        Goal.at_most("soak.ttft_p99_drift", drift["ttft_s"], DRIFT),
        Goal.at_most("soak.tpot_p99_drift", drift["tpot_s"], DRIFT),
    ]


def _drift(told: list[Told], name: str) -> float:
    """Last third's p99 over the first third's, less one."""
    values = [getattr(t, name) for t in told if t.ending == "finished"]
    third = max(1, len(values) // 3)
    return percentile(values[-third:], 0.99) / percentile(values[:third], 0.99) - 1.0


def _shown(slope: Slope) -> str:
    return (
        f"{slope.per_hour:+.2f} ± {slope.uncertainty:.2f} MiB/h "
        f"(least squares {slope.least_squares:+.2f})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
