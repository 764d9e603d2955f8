"""Coppice as a contender: the engine in process, closed loop."""

from __future__ import annotations

import gc
import time

from benchmarks.serving.measure import Job, Measured, read_job, write_measured
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams


def main() -> None:
    """Serve the job and report."""
    job = read_job()
    config = EngineConfig(
        model=job.model,
        dtype=job.dtype,
        kv_cache_mib=2048,
        prefix_cache=False,  # type: ignore[arg-type]
    )
    engine = Engine(load_engine_model(config), config)
    gc.freeze()  # as the engine process does
    _serve(engine, _warm_up(job))
    before = engine.stats()
    began = time.perf_counter()
    ttft, tpot = _serve(engine, job)
    seconds = time.perf_counter() - began
    after = engine.stats()
    steps = after.steps - before.steps
    model_s, other_s = after.model_s - before.model_s, after.other_s - before.other_s
    extra = {
        "other_share": other_s / (model_s + other_s),
        "other_ms_per_step": 1e3 * other_s / steps,
        "rows_per_step": (after.rows - before.rows) / steps,
    }
    write_measured(Measured(seconds, ttft, tpot, extra))


def _warm_up(job: Job) -> Job:
    return Job(job.model, job.dtype, 2, [p[:16] for p in job.prompts[:2]], [4, 4])


def _serve(engine: Engine, job: Job) -> tuple[list[float], list[float]]:
    pending = list(range(len(job.prompts)))[::-1]
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while pending or engine.has_work:
        while pending and len(sent) - len(last) < job.concurrency:
            i = pending.pop()
            params = SamplingParams(
                max_tokens=job.answers[i], temperature=0.0, ignore_eos=True, seed=0
            )
            key = f"{i}-{len(sent)}"
            sent[key] = time.perf_counter()
            engine.submit(Request(id=key, prompt=job.prompts[i], sampling=params))
        for output in engine.step():
            now = time.perf_counter()
            if output.tokens:
                first.setdefault(output.request_id, now)
            if output.finish_reason is not None:
                if output.finish_reason != "length":
                    raise RuntimeError(f"{output.request_id}: {output.finish_reason}")
                last[output.request_id] = now
    ttft = [first[k] - sent[k] for k in sent]
    tpot = [(last[k] - first[k]) / max(1, job.answers[int(k.split("-")[0])] - 1) for k in sent]
    return ttft, tpot


if __name__ == "__main__":
    main()
