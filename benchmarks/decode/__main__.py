"""``python -m benchmarks.decode [--quick]``: whole models beside peers and limits.

Random weights in the shapes of Qwen2.5-0.5B and Llama-3.2-1B, and the bundled model, in bf16,
int8 and int4. Tasks: decoding one sequence and eight (prompts of 128), prefill of 512, and one
forward pass of 1 to 32 rows over 512 cached tokens. The contenders take turns, each figure
between two bandwidth probes; a figure is the median over the rounds. A first round measures
everything; further ones measure single-sequence decoding, which depends most on the state of
the machine, and then the rest as long as ``--minutes`` lasts. ``make peers`` builds the peers.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.decode import table
from benchmarks.decode.contest import FORMATS, PEERS, TASKS, Case, Contest, Tokens
from benchmarks.decode.goals import Judge
from benchmarks.decode.shape import Shape
from benchmarks.probe import Prober, median_limits
from benchmarks.report import Report
from coppice.kernels.threads import usable_cores
from tools.peers import places
from tools.peers.models import MODELS, make_checkpoint, prepare

SHORT = {"qwen2.5-0.5b": Tokens(32, 32), "llama-3.2-1b": Tokens(16, 32)}
"""Enough for a steady figure; the bundled model, and all with --whole, get 128 and 128."""
QUICK_MODELS = ("bundled", "qwen2.5-0.5b")
QUICK_TASKS = ("decode1", "verify")
"""With --quick, of models with random weights; slow peers are then left out too."""


def main() -> int:
    """Run, print, keep; non-zero when a goal is missed."""
    args = _arguments()
    models = args.models or list(QUICK_MODELS if args.quick else MODELS)
    for model in models:
        make_checkpoint(model)
        for line in prepare(model):
            print(line, file=sys.stderr)
    tokens = {m: Tokens() if args.whole else SHORT.get(m, Tokens()) for m in models}
    prober = Prober()
    contest = Contest(
        threads=usable_cores(),
        tokens=tokens.__getitem__,
        limits=prober.limits,
    )
    if args.quick:
        contest.leave_out([peer for peer in PEERS if not peer.quick], "left out by --quick")
    cases = [Case(model, form) for model in models for form in args.formats]
    _run(contest, cases, args)
    report = Report(_name(args, models), table.COLUMNS)
    report.metrics["tokens"] = {m: t._asdict() for m, t in tokens.items()}
    for model in models:
        shape = Shape.of(places.checkpoint(model))
        judge = Judge(contest.figures, contest.facts, shape)
        report.rows += table.rows(judge, model, args.formats)
        report.metrics |= table.metrics(judge, model, args.formats)
        report.goals += judge.goals(model, args.formats)
    report.rows.append(_limits_row(contest))
    return report.finish()


def _limits_row(contest: Contest) -> list[str]:
    """The machine's rates over the whole run, as the table's last row."""
    pairs = [pair for figure in contest.figures.values() for pair in figure.limits]
    if not pairs:
        return ["machine", "", "limits", "nothing was measured", "0", "", "", ""]
    limits = median_limits([each for pair in pairs for each in pair])
    int8 = f"{limits.int8 / 1e9:.0f}" if limits.int8 else "not probed"
    text = f"G/s: fp32 {limits.fp32 / 1e9:.0f}, matmul {limits.matmul / 1e9:.0f}, int8 {int8}"
    read = f"{limits.read_bytes_s / 1e9:.1f}"
    disturbed = sum(figure.disturbed for figure in contest.figures.values())
    others = f"* {disturbed} of {len(pairs)} disturbed" if disturbed else ""
    return ["machine", others, "limits", text, str(2 * len(pairs)), "", read, ""]


def _run(contest: Contest, cases: list[Case], args: argparse.Namespace) -> None:
    """The first round, then more of what gains most from them while there is time."""
    began = time.perf_counter()
    limit_s = 60.0 * args.minutes
    for case in cases:
        quick = args.quick and case.model != "bundled"
        contest.round(case, [t for t in args.tasks if not quick or t in QUICK_TASKS])
    spent_s = time.perf_counter() - began
    if "decode1" in args.tasks:
        for _ in range(1, args.rounds):
            for case in cases:
                contest.round(case, ["decode1"], close_only=not args.whole)
    rest = [task for task in args.tasks if task != "decode1"]
    for _ in range(1, args.rounds):
        for case in cases:
            if rest and time.perf_counter() - began + spent_s / len(cases) < limit_s:
                contest.round(case, rest, close_only=not args.whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the smaller models, two tasks, the faster peers"
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=None)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=None, help="3; 1 with --quick")
    parser.add_argument("--minutes", type=float, default=12.0, help="no further rounds after that")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="decode 128 tokens with the large models too, and all rounds: about an hour",
    )
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    if args.whole:
        args.minutes = float("inf")
    return args


def _name(args: argparse.Namespace, models: list[str]) -> str:
    """One results file per kind of run."""
    parts = ["decode"]
    parts += ["quick"] if args.quick else []
    parts += models if args.models else []
    parts += args.formats if args.formats != list(FORMATS) else []
    parts += args.tasks if args.tasks != list(TASKS) else []
    return "-".join(parts)


if __name__ == "__main__":
    sys.exit(main())
