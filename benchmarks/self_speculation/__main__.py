"""``python -m benchmarks.self_speculation [--quick]``: does ``--speculate self`` pay here?

One set of int4 weights, four engines over it in one process: plain decoding with float rows (the
answers to keep), the same guessing three tokens ahead each step whatever it costs, the same as
users run it, and plain decoding with int8 rows (other answers, and what one gives up for exact
ones). Prompts are prose and code held out from training; prefill is left out. The formula is the
paper's, ``(1 - a^(g+1)) / ((1 - a)(g c + v))``, with acceptance ``a`` from the run and the prices
of passes ``c`` and ``v`` timed apart from it, on the model alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.report import Goal, Report
from benchmarks.speculation.prompts import KINDS, held_out
from benchmarks.suffix.target import wide_target
from coppice.cache.pool import KVPool
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.speculation import Controller, DraftTree, SelfDraft, Speculator

GAMMA = 3
BATCHES = (1, 2, 4, 8)
CONTEXT = 96
"""Cached tokens behind the passes that are timed apart; as many as the runs have on average."""

_RSS = """
import resource, sys
from coppice import LLM, SamplingParams
llm = LLM(sys.argv[1], quantization="int4-weight-only", speculate=sys.argv[2], kv_cache_mib=64)
llm.generate("Once upon a time", SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class Run(NamedTuple):
    """A batch decoded: seconds, tokens by request."""

    seconds: float
    tokens: dict[str, tuple[int, ...]]


class Counting(Speculator):
    """Counts drafts whose predecessors came true: ``tried``, and ``right`` of them."""

    tried = right = 0

    def observe(self, arrival: int, tree: DraftTree, accepted: int) -> None:
        """See `Speculator`."""
        self.tried += min(accepted + 1, len(tree))
        self.right += accepted
        super().observe(arrival, tree, accepted)


class Engines:
    """Four engines over one set of weights."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.model = load_engine_model(config)
        target = self.model.decoder
        assert isinstance(target, Decoder)
        twin = target.with_int8_rows()
        assert twin is not None
        self.target, self.twin = target, twin

    def plain(self) -> Engine:
        """Decoding as ever."""
        return Engine(self.model, self.config)

    def int8_rows(self) -> Engine:
        """Decoding with int8 rows: other answers."""
        model: EngineModel = replace(self.model, decoder=self.twin)
        return Engine(model, self.config)

    def always(self) -> Engine:
        """Three tokens ahead in each step: a controller to whom rows cost nothing."""
        controller = Controller(lambda _: 1.0, GAMMA)
        self.counts = Counting([SelfDraft(self.twin)], controller, self.model.facts.vocab_size)
        return Engine(self.model, self.config, speculator=self.counts)

    def controlled(self) -> Engine:
        """As users run it."""
        return Engine(self.model, replace(self.config, speculate="self"))

    def prices(self, batch: int, budget_s: float = 3.0) -> tuple[float, float]:
        """Of a draft pass and of a verify pass, in plain steps: medians, timed in turns."""
        passes = [(self.target, batch), (self.twin, batch), (self.target, batch * (GAMMA + 1))]
        runs = [self._pass(decoder, rows) for decoder, rows in passes]
        times: list[list[float]] = [[] for _ in runs]
        end = time.perf_counter() + budget_s
        while time.perf_counter() < end or len(times[0]) < 5:
            for run, found in zip(runs, times, strict=True):
                began = time.perf_counter()
                run()
                found.append(time.perf_counter() - began)
        plain, draft, verify = (statistics.median(each[1:]) for each in times)
        return draft / plain, verify / plain

    def _pass(self, decoder: Decoder, rows: int) -> Callable[[], object]:
        """A pass over so many rows, all of whose logits are wanted."""
        pool = KVPool(decoder.kv_layout(32), -(-(CONTEXT + rows) // 32))
        for pages in (*pool.k, *pool.v):
            pages.zero_()
        chunk = Rows.chunk(list(range(1, rows + 1)), list(range(pool.num_pages)), CONTEXT)
        return lambda: decoder.forward(chunk, pool)


def decode(engine: Engine, prompts: Sequence[list[int]], tokens: int, temperature: float) -> Run:
    """Seconds from the moment all sequences decode until the last has ended."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(
            max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=i
        )
        engine.submit(Request(id=str(i), prompt=prompt, sampling=sampling))
    began, steps_before = time.perf_counter(), True
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.tokens)
        if steps_before and len(found) == len(prompts):
            began, steps_before = time.perf_counter(), False
    return Run(time.perf_counter() - began, {key: tuple(t) for key, t in found.items()})


def formula(a: float, c: float, v: float) -> float:
    """Plain seconds over speculated ones."""
    return sum(a**k for k in range(GAMMA + 1)) / (GAMMA * c + v)


def measure(report: Report, name: str, engines: Engines, args: argparse.Namespace) -> None:
    """All batches of one model; rows, metrics, goals."""
    texts = held_out(engines.model.tokenizer, max(BATCHES) // 2)
    prompts = [engines.model.tokenizer.encode(text) for text in _mixed(texts)]
    accepted, off, least, first = [], [], float("inf"), 0.0
    for batch in BATCHES:
        a, times = _batch(engines, prompts[:batch], args)
        plain, always, controlled, int8 = times
        c, v = engines.prices(batch)
        told, got = formula(a, c, v), plain / always
        case = [name, str(batch), f"{a:.3f}", f"{c:.2f}", f"{v:.2f}", f"{told:.2f}", f"{got:.2f}"]
        report.rows.append([*case, f"{plain / controlled:.2f}", f"{plain / int8:.2f}"])
        report.metrics[f"{name}, batch {batch}"] = {
            "acceptance": a, "c": c, "v": v, "formula": told, "always": got,
            "controlled": plain / controlled, "int8 rows": plain / int8,
        }  # fmt: skip
        accepted.append(a)
        off.append(abs(got / told - 1.0))
        least = min(least, plain / controlled)
        first = first or plain / controlled
    report.goals += [
        Goal.at_least(f"acceptance per token, {name}, least", min(accepted), 0.8),
        Goal.at_least(f"speed-up at batch 1, {name}", first, 1.1),
        Goal.at_least(f"controlled over plain, {name}, least", least, 0.98),
        Goal.at_most(f"measured beside the formula, {name}, farthest", max(off), 0.10),
    ]


def _batch(
    engines: Engines, prompts: Sequence[list[int]], args: argparse.Namespace
) -> tuple[float, list[float]]:
    """Acceptance, and each engine's median seconds of rounds in turns at both temperatures."""
    four = [engines.plain(), engines.always(), engines.controlled(), engines.int8_rows()]
    seconds: list[list[float]] = [[] for _ in four]
    for engine in four:
        decode(engine, prompts[:1], 8, 0.0)
    for _ in range(args.rounds):
        spent = [0.0] * len(four)
        for temperature in (0.0, 0.8):
            runs = [decode(engine, prompts, args.tokens, temperature) for engine in four]
            if not runs[0].tokens == runs[1].tokens == runs[2].tokens:
                raise SystemExit("The answers differ with speculation on.")
            spent = [total + run.seconds for total, run in zip(spent, runs, strict=True)]
        for all_rounds, total in zip(seconds, spent, strict=True):
            all_rounds.append(total)
    counts = engines.counts
    return counts.right / max(1, counts.tried), [statistics.median(each) for each in seconds]


def _mixed(texts: dict[str, list[str]]) -> list[str]:
    """Prose and code in turns."""
    return [text for pair in zip(*(texts[kind] for kind in KINDS), strict=True) for text in pair]


def peak_ratio(model: str) -> float:
    """Peak resident memory of a process that drafts for itself over one that does not."""
    peaks = []
    for way in ("self", "off"):
        command = [sys.executable, "-c", _RSS, model, way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    return peaks[0] / peaks[1]


def main() -> int:
    """Run, print, keep; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.self_speculation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the bundled model alone")
    parser.add_argument("--tokens", type=int, default=None, help="of each answer")
    parser.add_argument("--rounds", type=int, default=None)
    args = parser.parse_args()
    args.tokens = args.tokens or (64 if args.quick else 33)
    args.rounds = args.rounds or (5 if args.quick else 1)
    columns = ["model", "batch", "a", "c", "v", "formula", "always 3", "controlled", "int8 rows"]
    report = Report(f"self_speculation{'-quick' if args.quick else ''}", columns)
    models = {"bundled": "bundled"} if args.quick else {"0.5B": str(wide_target())}
    for name, model in models.items():
        config = EngineConfig(
            model=model, quantization="int4-weight-only", kv_cache_mib=64, prefix_cache=False
        )
        measure(report, name, Engines(config), args)
        report.goals.append(Goal.at_most(f"peak memory, {name}", peak_ratio(model), 1.02))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
