"""``python -m benchmarks.suffix [--quick]``: suffix decoding on recorded and on live work.

Agent trajectories and rounds of edits are replayed with the bundled tokenizer, so that the
target's tokens are the recorded ones. At equal tree sizes: Coppice's suffix proposer, plain
prompt lookup, and the suffix cache of arctic-inference (``make peers PEERS=arctic-inference``).
The modelled speed-up takes step times of a 0.5B-shaped int8 model, measured here, and charges
each contender the time it took; peers get the best of their sizes, Coppice's controller picks
its own. Histories start empty; the first conversations fill them and are not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quiet import wait_until_quiet
from benchmarks.report import Goal, Report
from benchmarks.suffix import live, ours, timing, traces
from benchmarks.suffix.replay import Score, replay
from coppice.engine.calibrate import calibrate
from coppice.engine.config import EngineConfig
from coppice.engine.loading import load_engine_model, tokenizer_of
from coppice.models.load import load_model
from coppice.models.locate import BUNDLED
from tools.peers import places

LIMITS = (8, 16, 32)
CONTEXT = 8192
Scores = dict[tuple[str, str, int], Score]
"""By contender, trace and limit; limit 0 where a controller chose."""


def main() -> int:
    """Run, print, keep; non-zero when a goal is missed."""
    args = _arguments()
    tokenizer = tokenizer_of(load_model(BUNDLED))
    try:
        found = traces.load(tokenizer.encode, quick=args.quick, context=CONTEXT)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    step_s = _step_times(args.target)
    scores: Scores = {}
    for trace in found:
        for limit in LIMITS:
            scores["suffix", trace.name, limit] = _replay(trace, ours.suffix(), limit)
            scores["lookup", trace.name, limit] = _replay(trace, ours.lookup(), limit)
        auto = ours.Controlled(lambda rows: step_s[rows], max(LIMITS))
        scores["suffix", trace.name, 0] = _replay(trace, auto, max(LIMITS))
    why = _arctic(found, scores)
    report = Report("suffix", ["trace", "contender", "nodes", "tokens a step", "us", "speed-up"])
    for (who, name, limit), score in sorted(scores.items()):
        us = 1e6 * score.propose_s / score.steps
        row = [name, who, str(limit or "chosen"), f"{score.tokens_per_step:.2f}"]
        report.rows.append([*row, f"{us:.1f}", f"{score.speed_up(step_s):.2f}"])
    _judge(report, found, scores, step_s, why)
    wait_until_quiet()
    for stored in (100_000,) if args.quick else (100_000, 1_000_000):
        times = timing.proposal_times(found, stored)
        report.metrics[f"proposal_{stored}"] = times
        report.rows.append(
            ["all", "suffix", f"{stored} stored", "", f"{times['median_us']:.1f}", ""]
        )
        if stored == 100_000:
            goal = "one proposal at 100k stored tokens, us"
            report.goals.append(Goal.at_most(goal, times["median_us"], 30.0))
    report.metrics["append_us"] = timing.append_us(found)
    alive = live.live_speed_up(3 if args.quick else 7)
    report.metrics["live"] = alive
    row = ["live", "suffix", "chosen", f"{alive['tokens_per_step']:.2f}", ""]
    report.rows.append([*row, f"{alive['speed_up']:.2f}"])
    report.metrics["step_s"] = {str(n): step_s[n] for n in (1, 2, 4, 8, 16, 32)}
    return report.finish()


def _replay(trace: traces.Trace, contender: ours.Fixed, limit: int) -> Score:
    turns = [(turn.run, turn.prompt, turn.answer) for turn in trace.turns]
    return replay(turns, trace.warm, contender, limit)


def _step_times(target: str) -> list[float]:
    """Seconds of steps of 0 to 64 rows."""
    config = EngineConfig(model=target, quantization="int8")
    curve = calibrate(load_engine_model(config), seconds=4.0)
    return [curve.time(rows) for rows in range(65)]


def _arctic(found: Sequence[traces.Trace], scores: Scores) -> str:
    """Replay the peer's; why not, where it is not there."""
    python = places.python("arctic-inference")
    if not python.exists():
        return "not installed: make peers PEERS=arctic-inference"
    listed = [[t.name, [[u.run, u.prompt, u.answer] for u in t.turns], t.warm] for t in found]
    done = subprocess.run(
        [python, "-m", "benchmarks.suffix.arctic"],
        input=json.dumps({"traces": listed, "limits": LIMITS}) + "\n",
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        env=places.quiet_environment(),
    )
    if done.returncode:
        return f"it failed: {done.stderr.strip().splitlines()[-1:]}"
    for each in json.loads(done.stdout):
        score = Score(**each["score"])
        score = replace(score, sizes={int(n): count for n, count in score.sizes.items()})
        scores[f"arctic x{each['factor']:g}", each["trace"], each["limit"]] = score
    return ""


def _judge(
    report: Report,
    found: Sequence[traces.Trace],
    scores: Scores,
    step_s: Sequence[float],
    why: str,
) -> None:
    """The goals of the issue."""
    agents = [trace.name for trace in found if trace.agent]
    chosen = [scores["suffix", name, 0] for name in agents]
    tokens = sum(score.tokens for score in chosen)
    spent = sum(score.tokens / score.speed_up(step_s) for score in chosen)
    report.goals += [
        Goal.at_least("accepted tokens a step, agents", tokens / sum(s.steps for s in chosen), 3.5),
        Goal.at_least("modelled speed-up, agents", tokens / spent, 3.5),
    ]
    peers = sorted({who for who, _, _ in scores} - {"suffix"})
    if why:
        name = "tokens a step over arctic-inference, least"
        report.goals.append(Goal.unmeasured(name, "> 1", why))
    for peer in peers:
        ratios = [
            scores["suffix", trace.name, limit].tokens_per_step
            / scores[peer, trace.name, limit].tokens_per_step
            for trace in found
            for limit in LIMITS
        ]
        report.goals.append(Goal.at_least(f"tokens a step over {peer}, least", min(ratios), 1.0))
        best = [
            scores["suffix", t.name, 0].speed_up(step_s)
            / max(scores[peer, t.name, limit].speed_up(step_s) for limit in LIMITS)
            for t in found
        ]
        report.metrics[f"speed_up_over_best_{peer}"] = min(best)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suffix", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer conversations, fewer rounds")
    parser.add_argument(
        "--target", default=None, help="a 0.5B-shaped checkpoint; one is made where none is named"
    )
    args = parser.parse_args()
    if args.target is None:
        from benchmarks.suffix.target import wide_target

        args.target = str(wide_target())
    return args


if __name__ == "__main__":
    sys.exit(main())
