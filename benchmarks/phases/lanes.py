"""The engine's lanes on this machine: a mixed load in one, in two, and as ``auto`` chooses."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field, replace

from benchmarks.report import Goal, Report
from benchmarks.workloads.azure import text_tokens
from coppice.engine.config import EngineConfig, LaneChoice
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel
from coppice.engine.request import Request, SamplingParams

CHOICES: tuple[LaneChoice, ...] = ("one", "auto", "two")
CLIENTS = 4
NUM_REQUESTS = 8


@dataclass
class Run:
    """What a run of the load came to."""

    tokens_s: float
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def compare(report: Report, model: EngineModel, config: EngineConfig, *, rounds: int) -> None:
    """Alternating runs; the goal is that ``auto`` costs no throughput."""
    runs: dict[str, list[Run]] = {lanes: [] for lanes in CHOICES}
    mixed_load(model, config, num_requests=CLIENTS)  # everything has been touched once
    for turn in range(rounds):
        for lanes in CHOICES if turn % 2 else reversed(CHOICES):
            runs[lanes].append(mixed_load(model, replace(config, lanes=lanes)))
    rate = {}
    for lanes, found in runs.items():
        rate[lanes] = statistics.median(run.tokens_s for run in found)
        gaps = [gap for run in found for gap in run.gaps_s]
        ttft = statistics.mean(s for run in found for s in run.ttft_s)
        report.rows.append(
            ["this machine", f"{CLIENTS} clients", lanes, f"{ttft:.2f}",
             f"{statistics.mean(gaps) * 1e3:.1f}",
             f"{statistics.quantiles(gaps, n=20)[-1] * 1e3:.1f}", "", f"{rate[lanes]:.0f}"]
        )  # fmt: skip
    report.metrics["tokens_s"] = rate
    report.metrics["two_over_one"] = rate["two"] / rate["one"]
    report.goals.append(
        Goal.at_least(
            "automatic mode over one lane, this machine", rate["auto"] / rate["one"], 0.97
        )
    )


def mixed_load(model: EngineModel, config: EngineConfig, num_requests: int = NUM_REQUESTS) -> Run:
    """Clients that ask again as soon as they are answered: prompt and answer tokens a second."""
    rng = random.Random(1)
    vocab = model.facts.vocab_size
    coming = [
        Request(
            id=str(i),
            prompt=text_tokens(rng.choice((40, 150, 400)), vocab, i),
            sampling=SamplingParams(
                max_tokens=rng.randint(10, 40), temperature=0.0, ignore_eos=True
            ),
        )
        for i in range(num_requests)
    ]
    tokens = sum(len(r.prompt) + (r.sampling.max_tokens or 0) for r in coming)
    engine = Engine(model, config)
    run, last = Run(0.0), dict[str, float]()
    began = time.perf_counter()
    for _ in range(CLIENTS):
        _submit(engine, coming.pop(), last)
    seen = set[str]()
    while engine.has_work:
        for output in engine.step():
            now, name = time.perf_counter(), output.request_id
            (run.gaps_s if name in seen else run.ttft_s).append(now - last[name])
            seen.add(name)
            last[name] = now
            if output.finish_reason is not None and coming:
                _submit(engine, coming.pop(), last)
    run.tokens_s = tokens / (time.perf_counter() - began)
    engine.close()
    return run


def _submit(engine: Engine, request: Request, last: dict[str, float]) -> None:
    engine.submit(request)
    last[request.id] = time.perf_counter()
