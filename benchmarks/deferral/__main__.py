"""``python -m benchmarks.deferral [--quick]``: Symphony's setting in the simulator.

Batch times ``1.082 ms x b + 5.204 ms``, a deadline of 25 ms, 8 devices, Poisson arrivals split
evenly over the models. Goodput is the highest rate at which 99% of requests are on time. Eager
batching runs what is queued as soon as a device is free, up to a batch of half the budget; the
careful one also takes only as many as the first deadline allows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

from benchmarks.report import Goal, Report
from coppice.scheduling.deferral import Deferral, Dispatcher, Profile, Served

PROFILE = Profile(1.082e-3, 5.204e-3)
BUDGET_S = 0.025
DEVICES = 8
RULES: dict[str, dict[str, bool]] = {
    "eager": {"blind": True},
    "careful eager": {"eager": True},
    "deferred": {},
}


def main() -> int:
    """Goodput for 1, 8 and 32 models, packing over load, scheduler speed."""
    parser = argparse.ArgumentParser(prog="benchmarks.deferral", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    args = parser.parse_args()
    seconds = 3.0 if args.quick else 8.0
    report = Report("deferral", ["models", "rule", "goodput req/s", "mean batch", "busy devices"])
    ratios: dict[int, float] = {}
    careful: dict[int, float] = {}
    best: dict[tuple[int, str], float] = {}
    for models in (1, 8, 32):
        for rule in RULES:
            rate = goodput(models, rule, seconds)
            served = run(models, rate, rule, seconds)
            busy = sum(served.busy_s) / seconds
            best[models, rule] = rate
            mean = served.on_time / max(1, served.batches)
            report.rows.append(
                [str(models), rule, f"{rate:.0f}", f"{mean:.1f}", f"{busy:.1f}"]
            )  # fmt: skip
        ratios[models] = best[models, "deferred"] / best[models, "eager"]
        careful[models] = best[models, "deferred"] / best[models, "careful eager"]
    report.metrics["goodput_ratio"] = ratios
    report.metrics["goodput_ratio_careful"] = careful
    report.goals.append(
        Goal.at_least("goodput over careful eager, worst mix", min(careful.values()), 0.97)
    )
    report.goals.append(Goal.at_least("goodput over eager, one model", ratios[1], 1.3))
    report.goals.append(Goal.at_least("goodput over eager, 32 models", ratios[32], 0.97))
    report.goals.append(Goal.at_least("goodput over eager, 8 models", ratios[8], 0.97))
    top = best[1, "deferred"]
    per_load = {}
    for load in (0.3, 0.5, 0.7, 0.9):
        for rule in RULES:
            served = run(1, load * top, rule, seconds)
            busy = sum(served.busy_s) / seconds
            report.rows.append(
                ["1", f"{rule} at {load:.0%}", f"{load * top:.0f}", "",
                 f"{busy:.1f}"]
            )  # fmt: skip
            if rule == "deferred":
                per_load[load] = busy / load
    middle = statistics.mean(per_load.values())
    off = max(abs(value / middle - 1) for value in per_load.values())
    report.metrics["busy_per_load"] = per_load
    report.goals.append(Goal.at_most("busy devices against load, largest deviation", off, 0.15))
    began = time.perf_counter()
    served = run(1, top, "deferred", seconds)
    speed = served.requests / (time.perf_counter() - began)
    report.goals.append(Goal.at_least("requests scheduled a second, one thread", speed, 50_000))
    return report.finish()


def run(models: int, rate: float, rule: str, seconds: float, seed: int = 1) -> Served:
    """One run at a total rate."""
    rng = random.Random(seed)
    arrivals = []
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        arrivals.append((now, rng.randrange(models)))
    rules = [Deferral(PROFILE, BUDGET_S, **RULES[rule]) for _ in range(models)]
    return Dispatcher(rules, DEVICES).run(arrivals)


def goodput(models: int, rule: str, seconds: float) -> float:
    """Highest rate with 99% on time, by bisection to 1%."""
    low, high = 50.0, 8000.0
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        if run(models, middle, rule, seconds).share_on_time >= 0.99:
            low = middle
        else:
            high = middle
    return low


if __name__ == "__main__":
    sys.exit(main())
