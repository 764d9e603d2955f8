"""``python -m benchmarks.deadlines [--quick]``: AdaServe's traces in the simulator.

Step times are the row-count tables the authors published for Llama-3.1-70B (128 rows 55 ms, 256
85, 512 125, 1024 205), straight between them and below; a drafter's pass takes 1.5 ms a level.
How sure a drafter is and how often it is right are recorded from the bundled pair of models just
before. Wishes are those of the trace: 1.2 times the decode latency of one row, 50 ms, 150 ms.

First come, first served has the fixed length that misses least of each trace and rate. Beside it
play the rules of the engine: prompts get the rows that running requests' wishes leave, guesses are
chosen by need and then by worth. What they do for time per token is paid for in time to the first
token, which the traces have no wishes for; it is in the table. *All-knowing* is told which guesses
come true: no choice of guesses can do better.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.deadlines.guesses import Guess, record
from benchmarks.report import Goal, Report
from benchmarks.workloads.azure import DATA
from coppice.cost import StepCurve, rows_within
from coppice.scheduling import FlowQueues, Snapshot, make_policy, rows_of_guesses
from coppice.scheduling.budget import rows_in_time
from coppice.scheduling.planner import PREFILL_SHARE
from coppice.scheduling.record import spread
from coppice.scheduling.slo import tokens_needed
from coppice.scheduling.traces import as_sequences, read_trace
from coppice.scheduling.virtual import VirtualSequence
from coppice.speculation.select import select

CURVE = StepCurve((1, 128, 256, 512, 1024), (0.02523, 0.055, 0.085, 0.125, 0.205), 0.0)
DRAFT_S = 1.5e-3
CHUNK, MOST_ROWS, MOST_RUNNING = 256, 512, 64
DEEPEST = 8
LENGTHS = (0, 1, 2, 3, 4, 6, 8)
PACES = (1.0, 1.2, 1.4, 1.6)
TRACES = ("emission_rps2.6_ol256.csv", "emission_rps4.0_ol256.csv", "emission_rps4.0_prop0.3.csv",
          "emission_fluc_6m_peak4.0.csv")  # fmt: skip


class _Cost:
    """`StepCurve` as a planner sees it."""

    def time(self, num_rows: int) -> float:
        """Seconds of a step with guesses."""
        return CURVE.time(num_rows) + DRAFT_S * DEEPEST

    def rows_within(self, seconds: float, most: int) -> int:
        """Rows of a step that ends in time."""
        return rows_within(self.time, seconds, most)


class Fixed:
    """As many guesses for everybody, and prompts in whole chunks."""

    def __init__(self, length: int) -> None:
        self._length = length

    def prompt_rows(self, running: Sequence[VirtualSequence], now: float) -> int:
        """Rows for prompts."""
        del running, now
        return CHUNK

    def depths(
        self, decoding: Sequence[VirtualSequence], chances: Sequence[Sequence[float]], now: float,
        prompt_rows: int,
    ) -> list[int]:  # fmt: skip
        """Guesses of each."""
        del chances, now, prompt_rows
        return [self._length] * len(decoding)


class Select:
    """The engine's rules: `rows_in_time` and `select`, on the same figures."""

    def prompt_rows(self, running: Sequence[VirtualSequence], now: float) -> int:
        """Rows for prompts."""
        decoding = [s for s in running if s.first_token_s]
        snapshot = Snapshot(
            running=decoding, waiting=FlowQueues(make_policy().flows), now=now, num_available=1,
            page_size=1, max_rows=MOST_ROWS, max_sequences=MOST_RUNNING, prefill_chunk=CHUNK,
        )  # fmt: skip
        rows = rows_in_time(snapshot, _Cost(), PREFILL_SHARE)
        return min(CHUNK, rows - len(decoding))

    def depths(
        self, decoding: Sequence[VirtualSequence], chances: Sequence[Sequence[float]], now: float,
        prompt_rows: int,
    ) -> list[int]:  # fmt: skip
        """Guesses of each."""
        if not decoding:
            return []
        rows = prompt_rows + len(decoding)
        step_s = _Cost().time(rows + rows_of_guesses(decoding))
        prompts_s = CURVE.time(rows) - CURVE.time(len(decoding))
        offers = []
        for chain in chances:
            offer, product = [], 1.0
            for chance in chain:
                product *= chance
                offer.append(product)
            offers.append(offer)
        return select(
            offers, [tokens_needed(s, now, step_s) for s in decoding], MOST_ROWS,
            step_s=lambda n: _Cost().time(rows + n) - prompts_s,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a trace.

    Attributes:
        missed: part of the requests that did not get their wish.
        goodput: tokens a second of those that did.
        ttft_s: seconds to the first token, on average.
        ttft_p95_s: the same, at p95.
    """

    missed: float
    goodput: float
    ttft_s: float
    ttft_p95_s: float


def main() -> int:
    """Every trace and rate with every fixed length and with the engine's rules."""
    parser = argparse.ArgumentParser(prog="benchmarks.deadlines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one trace, fewer settings")
    args = parser.parse_args()
    lengths = (3, 4, 6) if args.quick else LENGTHS
    guesses = record(4 if args.quick else 32, 256)
    report = Report(
        f"deadlines{'-quick' if args.quick else ''}",
        ["trace", "rate", "rule", "missed", "goodput tok/s", "first token s", "p95"],
    )
    report.metrics["guesses_true"] = sum(g.true for g in guesses) / len(guesses)
    fewer, goods = {}, {}
    for name in TRACES[1:2] if args.quick else TRACES:
        for pace in PACES[1::2] if args.quick else PACES:
            fixed = {n: play(name, pace, guesses, Fixed(n)) for n in lengths}
            best = min(fixed, key=lambda n: fixed[n].missed)
            ours = play(name, pace, guesses, Select())
            oracle = play(name, pace, guesses, Select(), all_knowing=True)
            for label, found in (
                (f"FCFS, {best} guesses", fixed[best]), ("rules of the engine", ours),
                ("the same, all-knowing", oracle),
            ):  # fmt: skip
                report.rows.append(
                    [name, f"x{pace:g}", label, f"{found.missed:.1%}", f"{found.goodput:.0f}",
                     f"{found.ttft_s:.2f}", f"{found.ttft_p95_s:.2f}"]
                )  # fmt: skip
            case = f"{name} x{pace:g}"
            fewer[case] = fixed[best].missed / max(ours.missed, 1e-3)
            goods[case] = ours.goodput / max(f.goodput for f in fixed.values())
            report.metrics[case] = {
                "fixed": {n: vars(f) for n, f in fixed.items()}, "ours": vars(ours),
                "all_knowing": vars(oracle),
            }  # fmt: skip
    most, richest = max(fewer, key=fewer.__getitem__), max(goods, key=goods.__getitem__)
    report.metrics["missed_ratio"], report.metrics["goodput_ratio"] = fewer, goods
    report.goals.append(
        Goal.at_least(f"missed, best fixed length over ours, {most}", fewer[most], 4.0)
    )
    report.goals.append(
        Goal.at_least(f"goodput over the best fixed length, {richest}", goods[richest], 1.3)
    )
    return report.finish()


def play(
    name: str, pace: float, guesses: Sequence[Guess], rule: Fixed | Select, *,
    all_knowing: bool = False,
) -> Outcome:  # fmt: skip
    """One trace through continuous batching, prompts first come first served."""
    arrivals = read_trace(DATA / "adaserve_slo" / name)
    pending = as_sequences(arrivals, base_tpot_s=CURVE.time(1), pace=pace)
    rng = random.Random(1)
    begins = {s.arrival: rng.randrange(len(guesses)) for s in pending}
    waiting: list[VirtualSequence] = []
    running: list[VirtualSequence] = []
    done: list[VirtualSequence] = []
    now, at = 0.0, 0
    while len(done) < len(pending):
        while at < len(pending) and pending[at].submitted_s <= now:
            waiting.append(pending[at])
            at += 1
        while waiting and len(running) < MOST_RUNNING:
            running.append(waiting.pop(0))
        if not running:
            now = pending[at].submitted_s
            continue
        decoding = [s for s in running if s.first_token_s]
        prompt_rows = _read_prompts(running, rule.prompt_rows(running, now))
        ready = [s for s in running if not s.first_token_s and s.num_computed >= s.num_prompt]
        chains = [_chain(guesses, begins[s.arrival] + s.num_generated) for s in decoding]
        chances = [[float(g.true) if all_knowing else g.chance for g in c] for c in chains]
        counts = rule.depths(decoding, chances, now, prompt_rows)
        now += CURVE.time(prompt_rows + len(decoding) + sum(counts))
        now += DRAFT_S * max(counts, default=0)
        for s, chain, count in zip(decoding, chains, counts, strict=True):
            came = next((i for i, g in enumerate(chain[:count]) if not g.true), count)
            came = min(came, s.num_answer - s.num_generated - 1)  # no token beyond the last
            s.num_tokens += 1 + came
            s.accepted += came
        for s in ready:
            s.first_token_s = now
            s.num_tokens += 1
            s.first_tokens = s.num_tokens
        for s in [s for s in running if s.num_generated >= s.num_answer]:
            s.ended_s = now
            running.remove(s)
            done.append(s)
    return _outcome(done, now)


def _read_prompts(running: Sequence[VirtualSequence], rows: int) -> int:
    left = rows
    for s in running:
        taken = min(left, max(0, s.num_prompt - s.num_computed))
        s.num_computed += taken
        left -= taken
    return rows - left


def _chain(guesses: Sequence[Guess], at: int) -> list[Guess]:
    """The next guesses of an answer; after a wrong one, what they would be worth if it were not."""
    return [guesses[(at + k) % len(guesses)] for k in range(DEEPEST)]


def _outcome(done: Sequence[VirtualSequence], now: float) -> Outcome:
    met = [
        s for s in done
        if (s.ended_s - s.first_token_s) / (s.num_generated - 1) <= (s.tpot_s or 0.0)
    ]  # fmt: skip
    firsts = [s.first_token_s - s.submitted_s for s in done]
    return Outcome(
        1 - len(met) / len(done), sum(s.num_answer for s in met) / now,
        sum(firsts) / len(firsts), spread(firsts, (95,))[0],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
