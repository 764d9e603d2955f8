"""``python -m benchmarks.kernels [--quick]``: operators beside PyTorch's and the limits.

Linear layers by format, shape and rows, their weights cycled beyond the caches; attention at
8k tokens of context; norms and activations. Each is timed in turn with the fastest PyTorch
operator that does the same, between two bandwidth probes. Shares are of the probed bandwidth
and of the peak that the format can be multiplied with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from benchmarks.kernels.operators import (
    FORMATS,
    QUICK_LINEARS,
    Operator,
    attentions,
    linears,
    seconds_of,
    small_ones,
)
from benchmarks.probe import Limits, Prober, median_limits
from benchmarks.report import Goal, Report
from coppice.kernels import get_ops
from coppice.kernels.interface import Ops

COLUMNS = ["operator", "format", "rows", "µs", "GB/s", "of probe", "G/s", "of peak", "PyTorch µs"]
ROWS, QUICK_ROWS = [1, 4, 8, 16, 32, 512], [1, 16, 512]
ATTENTION_SHARE = 0.5


def main() -> int:
    """Run, print, keep; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows and shapes, one round")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    torch.manual_seed(0)
    prober = Prober()
    report = Report("kernels-quick" if args.quick else "kernels", [*COLUMNS, "speedup"])
    rounds = 1 if args.quick else 3
    for operator in _operators(get_ops(prefer="native"), args.formats, args.quick):
        found, limits = _measure(operator, prober, rounds)
        _add(report, operator, found, limits)
        print(f"{operator.name} {operator.form} {operator.rows}", file=sys.stderr, flush=True)
    return report.finish()


def _operators(ops: Ops, formats: list[str], quick: bool) -> Iterator[Operator]:
    for form in formats:
        if quick:
            yield from linears(ops, form, QUICK_ROWS, QUICK_LINEARS)
        else:
            yield from linears(ops, form, ROWS)
    yield from attentions(ops)
    yield from small_ones(ops)


def _measure(operator: Operator, prober: Prober, rounds: int) -> tuple[dict[str, float], Limits]:
    """Medians over the rounds: seconds of ours and of each peer, and the limits around ours."""
    found: dict[str, list[float]] = {}
    limits = []
    for _ in range(rounds):
        limits.append(prober.limits())
        if operator.ours is not None:
            found.setdefault("ours", []).append(seconds_of(operator.ours))
        limits.append(prober.limits())
        for name, call in operator.peers.items():
            found.setdefault(f"PyTorch {name}", []).append(seconds_of(call))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return medians, median_limits(limits)


def _add(
    report: Report,
    operator: Operator,
    found: dict[str, float],
    limits: Limits,
) -> None:
    """A row, the figures, and the goal where there is one."""
    start = [operator.name, operator.form, str(operator.rows)]
    key = " ".join(start)
    report.metrics[key] = {**found, "note": operator.note, "limits": asdict(limits)}
    peers = {name: s for name, s in found.items() if name.startswith("PyTorch")}
    best = min(peers, key=lambda name: peers[name])
    theirs = f"{1e6 * peers[best]:.1f} ({best.removeprefix('PyTorch ')})"
    peak = limits.int8 if operator.form.startswith("int") else limits.bf16
    ours = found.get("ours")
    if ours is None:
        report.rows.append([*start, "not built", "", "", "", "", theirs, ""])
    else:
        read, rate = operator.size_bytes / ours, operator.ops / ours
        report.rows.append(
            [
                *start,
                f"{1e6 * ours:.1f}",
                f"{read / 1e9:.1f}",
                f"{read / limits.read_bytes_s:.2f}",
                f"{rate / 1e9:.0f}",
                f"{rate / peak:.2f}" if peak else "not probed",
                theirs,
                f"{peers[best] / ours:.2f}",
            ]
        )
    if operator.name.startswith("attention prefill") and ours is not None:
        share = operator.ops / ours / limits.bf16
        goal = Goal.at_least(f"{operator.name}: share of bf16 peak", share, ATTENTION_SHARE)
        report.goals.append(goal)


if __name__ == "__main__":
    sys.exit(main())
