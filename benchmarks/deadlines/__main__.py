"""``python -m benchmarks.deadlines [--quick]``: AdaServe's traces in the simulator.

Step times are the row-count tables the authors published for Llama-3.1-70B (128 rows 55 ms, 256
85, 512 125, 1024 205), straight between them and below. A drafter's pass takes 1.5 ms a level;
its likeliest token at a level is right with a probability drawn anew from Beta(5, 2) (mean 0.71),
known to the selector, as draft probabilities are. Both sides see the same draws. The fixed
length of FCFS and the budget of the select step are each the best of a few, as theirs were.
Wishes are those of the trace: 1.2 times the decode latency of one row, 50 ms, 150 ms.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report import Goal, Report
from benchmarks.workloads.azure import DATA
from coppice.cost import StepCurve
from coppice.scheduling.slo import tokens_needed
from coppice.scheduling.traces import as_sequences, read_trace
from coppice.scheduling.virtual import VirtualSequence
from coppice.speculation.select import select

CURVE = StepCurve((1, 128, 256, 512, 1024), (0.02523, 0.055, 0.085, 0.125, 0.205), 0.0)
DRAFT_S = 1.5e-3
CHUNK, MOST_RUNNING = 256, 64
DEEPEST = 8
LENGTHS = (0, 1, 2, 3, 4, 6, 8)
BUDGETS = (60, 90, 120, 160, 240)
TRACES = ("emission_rps2.6_ol256.csv", "emission_rps4.0_ol256.csv", "emission_rps4.0_prop0.3.csv",
          "emission_fluc_6m_peak4.0.csv")  # fmt: skip

Depths = Callable[[Sequence[VirtualSequence], list[list[float]], float, int], list[int]]
"""Draft tokens of each sequence, from their chances, the time and the rows of prompts."""


@dataclass(frozen=True)
class Outcome:
    """Part of the requests that missed their wish, and tokens a second of those that met it."""

    missed: float
    goodput: float


def main() -> int:
    """Every trace with every fixed length and with the select step."""
    parser = argparse.ArgumentParser(prog="benchmarks.deadlines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two traces, fewer settings")
    args = parser.parse_args()
    names = TRACES[1:3] if args.quick else TRACES
    lengths = (2, 4, 6) if args.quick else LENGTHS
    budgets = (90, 160) if args.quick else BUDGETS
    report = Report("deadlines", ["trace", "rule", "missed", "goodput tok/s"])
    ratios, goods = {}, {}
    for name in names:
        fixed = {n: play(name, lambda *a, n=n: _fixed(n, *a)) for n in lengths}
        chosen = {b: play(name, lambda *a, b=b: _selected(b, *a)) for b in budgets}
        best_n = min(fixed, key=lambda n: fixed[n].missed)
        best_b = min(chosen, key=lambda b: chosen[b].missed)
        for label, found in (
            (f"FCFS, fixed {best_n}", fixed[best_n]),
            (f"select, budget {best_b}", chosen[best_b]),
        ):
            report.rows.append([name, label, f"{found.missed:.1%}", f"{found.goodput:.0f}"])
        ratios[name] = fixed[best_n].missed / max(chosen[best_b].missed, 1e-3)
        goods[name] = max(c.goodput for c in chosen.values()) / max(
            f.goodput for f in fixed.values()
        )
        report.metrics[name] = {
            "fixed": {n: (f.missed, f.goodput) for n, f in fixed.items()},
            "select": {b: (c.missed, c.goodput) for b, c in chosen.items()},
        }
    report.metrics["missed_ratio"], report.metrics["goodput_ratio"] = ratios, goods
    report.goals.append(
        Goal.at_least("missed with the best fixed length over select", max(ratios.values()), 4.0)
    )
    report.goals.append(
        Goal.at_least("goodput over the best fixed length", max(goods.values()), 1.3)
    )
    return report.finish()


def _fixed(
    length: int, running: Sequence[VirtualSequence], chances: list[list[float]], now: float,
    prompt_rows: int,
) -> list[int]:  # fmt: skip
    del chances, now, prompt_rows
    return [length] * len(running)


def _selected(
    budget: int, running: Sequence[VirtualSequence], chances: list[list[float]], now: float,
    prompt_rows: int,
) -> list[int]:  # fmt: skip
    if not running:
        return []
    depth = min(DEEPEST, max(1, round(budget / len(running))))
    rows = prompt_rows + len(running)
    step_s = CURVE.time(rows + len(running)) + DRAFT_S * depth
    needs = [tokens_needed(s, now, step_s) for s in running]
    offers = []
    for chain in chances:
        offer, product = [], 1.0
        for chance in chain[:depth]:
            product *= chance
            offer.append(product)
        offers.append(offer)
    return select(offers, needs, 1 << 20, step_s=lambda n: CURVE.time(rows + n) + DRAFT_S * depth)


def play(name: str, depths: Depths) -> Outcome:
    """One trace through continuous batching with chunked prefill, first come first served."""
    arrivals = read_trace(DATA / "adaserve_slo" / name)
    pending = as_sequences(arrivals, base_tpot_s=CURVE.time(1))
    waiting: list[VirtualSequence] = []
    running: list[VirtualSequence] = []
    done: list[VirtualSequence] = []
    now, at, rng = 0.0, 0, random.Random(1)
    while len(done) < len(pending):
        while at < len(pending) and pending[at].submitted_s <= now:
            waiting.append(pending[at])
            at += 1
        while waiting and len(running) < MOST_RUNNING:
            running.append(waiting.pop(0))
        if not running:
            now = pending[at].submitted_s
            continue
        left = CHUNK
        for s in running:
            rows = min(left, s.num_prompt - s.num_computed)
            s.num_computed += rows
            left -= rows
        decoding = [s for s in running if s.first_token_s]
        ready = [s for s in running if not s.first_token_s and s.num_computed >= s.num_prompt]
        chances = [[rng.betavariate(5, 2) for _ in range(DEEPEST)] for _ in decoding]
        counts = depths(decoding, chances, now, CHUNK - left)
        now += CURVE.time(CHUNK - left + len(decoding) + sum(counts))
        now += DRAFT_S * max(counts, default=0)
        for s, chain, count in zip(decoding, chances, counts, strict=True):
            s.num_tokens += 1
            for chance in chain[:count]:
                if rng.random() >= chance:
                    break
                s.num_tokens += 1
        for s in ready:
            s.first_token_s = now
            s.num_tokens += 1
        for s in [s for s in running if s.num_generated >= s.num_answer]:
            s.ended_s = now
            running.remove(s)
            done.append(s)
    met = [
        s for s in done
        if (s.ended_s - s.first_token_s) / (s.num_generated - 1) <= (s.tpot_s or 0.0)
    ]  # fmt: skip
    return Outcome(1 - len(met) / len(done), sum(s.num_answer for s in met) / now)


if __name__ == "__main__":
    sys.exit(main())
