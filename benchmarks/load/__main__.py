"""``python -m benchmarks.load [--quick]``: the load table, Coppice and llama.cpp in one run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.load import shapes
from benchmarks.load.subjects import Coppice, LlamaCpp
from benchmarks.report import Goal, Report
from benchmarks.scorecard.subjects import Running, Subject

SHAPES = ("saturation", "burst", "crowd", "slow", "idle")
OURS = "coppice"


class Run:
    """One server under the shapes asked for; figures by name."""

    def __init__(self, subject: Subject, only: set[str], *, quick: bool) -> None:
        self.subject, self.only, self.quick = subject, only, quick
        self.figures: dict[str, Any] = {}
        self.rows: list[list[str]] = []

    def run(self) -> None:
        """Each shape on a server of its own, so that none is left over from the one before."""
        with Running(self.subject) as server:
            self.capacity = shapes.capacity(server, 8.0 if self.quick else 60.0)
            self.figures["capacity"] = self.capacity
            self._row("capacity", f"{self.capacity:.2f} good requests/s")
            if "saturation" in self.only:
                self._saturation(server)
        steps: dict[str, Callable[[Running], None]] = {
            "burst": self._burst, "crowd": self._crowd, "slow": self._slow, "idle": self._idle,
        }  # fmt: skip
        for name, step in steps.items():
            if name in self.only:
                with Running(self.subject) as server:
                    step(server)
        if "crowd" in self.only and self.subject.name == OURS:
            with Running(Coppice("--order", "arrival")) as server:
                self._crowd(server, "crowd, order of arrival")

    def _row(self, shape: str, text: str) -> None:
        self.rows.append([self.subject.name, shape, text])
        print(f"{self.subject.name} {shape}: {text}", flush=True)

    def _saturation(self, server: Running) -> None:
        levels = shapes.saturation(server, self.capacity, 15.0 if self.quick else 600.0)
        self.figures["saturation"] = [asdict(each) for each in levels]
        for each in levels:
            self._row(
                f"{each.factor:g} x capacity",
                f"{each.goodput:.2f} good/s; TTFT p50 {each.ttft_p50_s:.2f} p99 "
                f"{each.ttft_p99_s:.2f} s; refused in {1e3 * each.refusal_s:.0f} ms at p99; "
                f"{each.endings} {each.why[:80]}",
            )

    def _burst(self, server: Running) -> None:
        made = shapes.burst(server, self.capacity, patience_s=60.0 if self.quick else 600.0)
        self.figures["burst"] = asdict(made)
        self._row("burst", f"{made.endings}; empty after {made.empty_s:.1f} s, predicted "
                           f"{made.predicted_s:.1f} s")  # fmt: skip

    def _crowd(self, server: Running, name: str = "crowd") -> None:
        self.figures.setdefault("solo_s", shapes.solo(server))
        made = shapes.crowd(server, 15.0 if self.quick else 1800.0)
        self.figures[name] = asdict(made)
        solo_s = self.figures["solo_s"]
        waits = ", ".join(
            f"{length}: {wait:.2f} ({wait / solo_s:.1f}), {made.asked_s[length]:.1f}"
            for length, wait in made.waits_s.items()
        )
        self._row(name, f"{made.endings}; longest wait in seconds (in solo times of {solo_s:.3f} "
                        f"s) once let in, and from the first attempt: {waits}")  # fmt: skip

    def _slow(self, server: Running) -> None:
        if self.subject.name == OURS:
            shapes.fill_pages(server)
        made = shapes.slow_readers(server, 8.0 if self.quick else 60.0)
        self.figures["slow"] = asdict(made)
        self._row("slow readers", f"{made.beside:.0f} tok/s beside {made.readers} of them, "
                                  f"{made.alone:.0f} alone; {made.grown_mib:+.1f} MiB; "
                                  f"{made.failed} failed")  # fmt: skip

    def _idle(self, server: Running) -> None:
        if self.subject.name == OURS:
            shapes.fill_pages(server)
        made = shapes.idle_connections(server)
        self.figures["idle"] = asdict(made)
        self._row("idle", f"{made.streams} streams nobody reads and {made.connections} kept "
                          f"connections, {made.open} of them open; {made.grown_mib:+.1f} MiB; "
                          f"another request answered in {made.answered_s:.2f} s")  # fmt: skip


def _longest_refusal_s(levels: Sequence[dict[str, Any]]) -> float:
    """The p99 of refusals at the level where it is longest; NaN, and no goal met, without any."""
    return max((x for each in levels if not math.isnan(x := each["refusal_s"])), default=math.nan)


def goals_of(figures: dict[str, Any]) -> list[Goal]:
    """Coppice's goals, of the shapes that ran."""
    goals: list[Goal] = []
    if levels := figures.get("saturation"):
        peak, last = max(each["goodput"] for each in levels), levels[-1]
        goals += [
            Goal.at_least("load.goodput_at_3x_of_peak", last["goodput"] / peak, 0.9),
            Goal.at_most("load.refusal_p99_ms", 1e3 * _longest_refusal_s(levels), 50),
            Goal.at_most(
                "load.ttft_p99_at_3x_of_0.7x", last["ttft_p99_s"] / levels[0]["ttft_p99_s"], 2
            ),
            Goal.at_most("load.failed", sum(each["endings"]["failed"] for each in levels), 0),
        ]
    if made := figures.get("burst"):
        off = abs(made["empty_s"] / made["predicted_s"] - 1) if made["predicted_s"] else math.inf
        goals += [
            Goal.at_most("load.burst_failed", made["endings"]["failed"], 0),
            Goal.at_most("load.burst_empty_off_prediction", off, 0.25),
        ]
    if made := figures.get("crowd"):
        shortest = made["waits_s"][shapes.CLASSES[0]] / figures["solo_s"]
        goals += [
            Goal.at_most("load.crowd_failed", made["endings"]["failed"], 0),
            Goal.at_most("load.crowd_shortest_wait_in_solo_times", shortest, 20),
        ]
    if made := figures.get("slow"):
        goals += [
            Goal.at_least("load.slow_readers", made["readers"], 100),
            Goal.at_most("load.failed_beside_slow_readers", made["failed"], 0),
            Goal.at_least("load.beside_slow_readers", made["beside"] / made["alone"], 0.95),
            Goal.at_most("load.slow_readers_mib", made["grown_mib"], 64),
        ]
    if made := figures.get("idle"):
        goals += [
            Goal.at_least("load.idle_open", made["streams"] + made["open"], 1000),
            Goal.at_most("load.idle_mib", made["grown_mib"], 64),
        ]
    return goals


def main() -> int:
    """Run both servers, print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.load")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--only", choices=SHAPES, action="append", help="these shapes")
    parser.add_argument("--subject", choices=[OURS, "llama.cpp"], help="only this server")
    args = parser.parse_args()
    report = Report("load-quick" if args.quick else "load", ["server", "shape", "found"])
    for subject in (Coppice(), LlamaCpp()):
        if args.subject not in (None, subject.name):
            continue
        if why := subject.absent():
            print(f"{subject.name}: {why}")
            continue
        run = Run(subject, set(args.only or SHAPES), quick=args.quick)
        run.run()
        report.rows += run.rows
        report.metrics[subject.name] = run.figures
        if subject.name == OURS:
            report.goals = goals_of(run.figures)
    if args.only or args.subject:
        report.benchmark += "-" + "-".join(args.only or [args.subject])
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
