"""``python -m benchmarks.never_slower [--quick]``: ``auto`` is at least 0.97x plain decoding.

Twenty workloads, random tokens among them, at batch 1 to 32. Two engines share one model in
one process; each round decodes the same new prompts with both, in alternating order, and a
workload's figure is the median over its rounds of plain over speculated time, prefill left
out. The bundled model, whose short steps show every overhead, and without ``--quick`` also a
0.5B-shaped int8 one. There too: the share of Python in a step of eight sequences.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.never_slower.workloads import WORKLOADS, Prompts, Workload
from benchmarks.report import Goal, Report
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams


class Pair:
    """A plain and a speculating engine over one model."""

    def __init__(self, config: EngineConfig) -> None:
        model = load_engine_model(config)
        self.plain = Engine(model, replace(config, speculate="off"))
        self.auto = Engine(model, config)
        self.prompts = Prompts(model.tokenizer.encode, model.tokenizer.vocab_size)
        self._count = 0

    def ratio(self, workload: Workload, rounds: int, tokens: int) -> list[float]:
        """Plain over speculated seconds of each round; above 1 is faster."""
        found = []
        for number in range(rounds + 1):
            prompts = self.prompts.draw(workload)
            pair = (self.plain, self.auto) if number % 2 else (self.auto, self.plain)
            spent = {engine: self._decode(engine, prompts, workload, tokens) for engine in pair}
            if number:  # the first warms up
                found.append(spent[self.plain] / spent[self.auto])
        return found

    def _decode(
        self, engine: Engine, prompts: Sequence[list[int]], workload: Workload, tokens: int
    ) -> float:
        """Seconds from the moment all sequences decode until the last has ended."""
        self._count += 1
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(
                max_tokens=tokens,
                temperature=workload.temperature,
                ignore_eos=True,
                seed=number,
            )
            name = f"{self._count}-{number}"
            engine.submit(Request(id=name, prompt=prompt, sampling=sampling))
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {output.request_id for output in engine.step()}
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began


def python_share(config: EngineConfig, rounds: int) -> float:
    """Time of a step of eight that is neither the model's nor idle: all Python there is."""
    pair = Pair(replace(config, speculate="suffix"))
    pair.ratio(Workload("repeats", 8, 0.0), 1, 32)
    before = pair.auto.stats()
    pair.ratio(Workload("repeats", 8, 0.0), rounds, 48)
    after = pair.auto.stats()
    outside = (after.draft_s - before.draft_s) + (after.other_s - before.other_s)
    return outside / (outside + after.model_s - before.model_s)


def main() -> int:
    """Run, print, keep; non-zero when a workload is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.never_slower", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the bundled model, fewer rounds")
    parser.add_argument("--target", default=None, help="a 0.5B-shaped checkpoint")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    args = parser.parse_args()
    rounds, tokens = (15, 64) if args.quick else (25, 64)
    report = Report("never_slower", ["model", "workload", "auto over plain", "rounds"])
    models = {"bundled": EngineConfig(speculate="auto")}
    if not args.quick or args.target:
        from benchmarks.suffix.target import wide_target

        wide = args.target or str(wide_target())
        models["0.5B int8"] = EngineConfig(
            model=wide, quantization="int8", speculate="auto", draft_model="bundled-draft"
        )
    for name, config in models.items():
        pair = Pair(config)
        least = float("inf")
        for workload in WORKLOADS:
            if args.only not in str(workload):
                continue
            short = name != "bundled" and workload.batch > 1
            each = 3 if name != "bundled" else rounds
            found = pair.ratio(workload, each, 24 if short else tokens)
            middle = statistics.median(found)
            least = min(least, middle)
            spread = ", ".join(f"{ratio:.2f}" for ratio in sorted(found))
            report.rows.append([name, str(workload), f"{middle:.3f}", spread])
            report.metrics[f"{name}: {workload}"] = middle
        report.goals.append(Goal.at_least(f"auto over plain, {name}, least", least, 0.97))
        if name != "bundled":
            share = python_share(config, 2)
            report.goals.append(Goal.at_most("Python in a step of eight", share, 0.06))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
