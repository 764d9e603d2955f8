"""``python -m benchmarks.serving [--quick]``: Coppice beside `transformers`, closed loop.

Models: the bundled one, and random weights in the shape of Qwen2.5-0.5B in bf16. Prompt and
answer lengths are those of the Azure conversation trace, divided by a stated factor. In the
first round every way of running `transformers` takes its turn; in the later ones Coppice and
the fastest of them alternate, and each figure is the median over the rounds. A peer that is
not done after two and a half times Coppice's time, and a minute, gives up: its throughput is
then an upper bound (marked ``<``), and it sits out the model's larger loads. Where bf16 is
emulated, `transformers` also runs in float32, which is faster there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Goal, Report, machine
from benchmarks.serving.measure import Job, run_contender
from benchmarks.workloads.azure import azure_lengths, text_tokens
from coppice.models.load import locate
from tools.make_model import make_model

PATIENCE, LEAST_LIMIT_S = 2.5, 60.0
"""A peer may take this many times as long as Coppice did, and this long in any case."""

PEER = "benchmarks.peers.transformers_serving"


OURS = "coppice"

Contender = tuple[str, str, str]
"""Module, batching mode, dtype."""


def contenders() -> dict[str, Contender]:
    """Name to module, batching mode and dtype; Coppice first, for it sets the limit."""
    found = {
        OURS: ("benchmarks.serving.coppice", "", "bfloat16"),
        "transformers static": (PEER, "static", "bfloat16"),
        "transformers continuous": (PEER, "continuous", "bfloat16"),
    }
    if not {"avx512_bf16", "amx_tile"} & set(machine()["isa"]):
        found["transformers static float32"] = (PEER, "static", "float32")
        found["transformers continuous float32"] = (PEER, "continuous", "float32")
    return found


def main() -> int:
    """Run every model and concurrency; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests, one round")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of alternating runs")
    parser.add_argument("--divide", type=float, default=8.0, help="trace lengths are divided by")
    parser.add_argument("--seed", type=int, default=1, help="place in the trace")
    parser.add_argument("--models", nargs="*", default=["bundled", "qwen2.5-0.5b"])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 3)
    whole = args.models == parser.get_default("models")
    report = Report(
        "serving" if whole else f"serving-{'-'.join(args.models)}",
        ["model", "clients", "contender", "output tok/s", "TTFT p50 s", "TPOT p50 ms", "ratio"],
    )
    report.metrics["divide"] = args.divide
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = locate(name) if name == "bundled" else Path(scratch) / name
            if name != "bundled":
                make_model(name, folder)
            peers = contenders()
            for clients in args.concurrency:
                job = _job(folder, clients, args)
                peers = _compare(report, name, job, rounds=rounds, peers=peers)
            _overhead_goals(report, name, folder)
    return report.finish()


def _job(folder: Path, clients: int, args: argparse.Namespace) -> Job:
    config = json.loads((folder / "config.json").read_text())
    count = max(4 if args.quick else 8, clients)
    lengths = azure_lengths(
        count,
        divide=args.divide,
        max_context=min(1024, config["max_position_embeddings"]),
        seed=args.seed,
    )
    prompts = [
        text_tokens(item.prompt, min(4096, config["vocab_size"]), seed=i)
        for i, item in enumerate(lengths)
    ]
    return Job(str(folder), "bfloat16", clients, prompts, [item.answer for item in lengths])


def _compare(
    report: Report, name: str, job: Job, *, rounds: int, peers: dict[str, Contender]
) -> dict[str, Contender]:
    """Alternate the contenders and add a row each, with the ratio to the best peer.

    Returns:
        Those that did not give up; the fastest peer in any case.
    """
    runs: dict[str, list[dict[str, float]]] = {c: [] for c in peers}
    limit_s, turn = 0.0, list(peers)
    for _ in range(rounds):
        for contender in turn:
            module, mode, dtype = peers[contender]
            this = replace(job, mode=mode, dtype=dtype, limit_s=limit_s)
            measured = run_contender(module, this)
            if contender == OURS:
                limit_s = max(limit_s, LEAST_LIMIT_S, PATIENCE * measured.seconds)
            runs[contender].append(measured.summary(this))
            print(  # a run takes minutes: say that it goes on
                f"{name}, {job.concurrency} clients: {contender} {measured.seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        fastest = max((c for c in peers if c != OURS), key=lambda c: runs[c][0]["output_tok_s"])
        turn = [OURS] if runs[fastest][0]["gave_up"] else [OURS, fastest]
    _add_rows(report, name, job, runs)
    return {c: peers[c] for c in peers if c in (OURS, fastest) or not runs[c][0]["gave_up"]}


def _add_rows(report: Report, name: str, job: Job, runs: dict[str, list[dict[str, float]]]) -> None:
    """Medians of one model under one load, and its goals."""
    medians = {
        contender: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for contender, found in runs.items()
    }
    best = max(m["output_tok_s"] for c, m in medians.items() if c != OURS)
    for m in medians.values():  # JSON knows no NaN
        for key in [k for k, v in m.items() if math.isnan(v)]:
            del m[key]
    for contender, m in medians.items():
        report.rows.append(
            [
                name,
                str(job.concurrency),
                contender,
                f"{'< ' if m['gave_up'] else ''}{m['output_tok_s']:.1f}",
                "-" if m["gave_up"] else f"{m['ttft_p50_s']:.3f}",
                "-" if m["gave_up"] else f"{m['tpot_p50_ms']:.2f}",
                f"{m['output_tok_s'] / best:.2f}",
            ]
        )
    key = f"{name}@{job.concurrency}"
    report.metrics[key] = medians
    ratio = medians[OURS]["output_tok_s"] / best
    if job.concurrency == 8:
        report.goals.append(Goal.at_least(f"{key}: throughput over transformers", ratio, 2.0))
    if name != "bundled":
        share = medians[OURS]["other_share"]
        report.goals.append(Goal.at_most(f"{key}: time outside the model, share", share, 0.08))


def _overhead_goals(report: Report, name: str, folder: Path) -> None:
    """Time outside the model at 64 decoding sequences, per step."""
    if name != "bundled":
        return
    prompts = [text_tokens(32, 4096, seed=i) for i in range(64)]
    job = Job(str(folder), "bfloat16", 64, prompts, [128] * 64)
    extra = run_contender("benchmarks.serving.coppice", job).extra
    report.metrics["bundled@64"] = extra
    report.goals.append(
        Goal.at_most("64 sequences: ms a step outside the model", extra["other_ms_per_step"], 1.0)
    )


if __name__ == "__main__":
    raise SystemExit(main())
