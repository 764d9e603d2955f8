"""`transformers` as a contender: static ``generate`` or its own continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.serving.measure import Job, Measured, read_job, write_measured


def main() -> None:
    """Serve the job in the asked-for mode and report."""
    job = read_job()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    warm = torch.full((1, 8), 5)
    model.generate(warm, attention_mask=torch.ones_like(warm), max_new_tokens=2, do_sample=False)
    serve = {"static": _serve_static, "continuous": _serve_continuous}[job.mode]
    began = time.perf_counter()
    ttft, tpot = serve(model, job)
    write_measured(Measured(time.perf_counter() - began, ttft, tpot, {}))


class _Clock:
    """A streamer that notes when each step's tokens appear."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _serve_static(model: Any, job: Job) -> tuple[list[float], list[float]]:
    """Batches of ``concurrency`` in order, left-padded, until the longest answer is done."""
    ttft, tpot = [], []
    for at in range(0, len(job.prompts), job.concurrency):
        prompts = job.prompts[at : at + job.concurrency]
        answers = job.answers[at : at + job.concurrency]
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        marks: list[float] = []

        def note(_ids: Any, _scores: Any, marks: list[float] = marks, **_: Any) -> Any:
            marks.append(time.perf_counter())
            return torch.zeros(_ids.shape[0], dtype=torch.bool)

        began = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max(answers),
            do_sample=False,
            stopping_criteria=[note],
        )
        ttft.extend(marks[0] - began for _ in prompts)
        tpot.extend((marks[n - 1] - marks[0]) / max(1, n - 1) for n in answers)
    return ttft, tpot


def _serve_continuous(model: Any, job: Job) -> tuple[list[float], list[float]]:
    """Its continuous batching, fed a new request as each one ends."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    pending = list(range(len(job.prompts)))[::-1]
    sent: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        while len(times) < len(job.prompts):
            while pending and len(sent) - len(times) < job.concurrency:
                i = pending.pop()
                sent[str(i)] = time.perf_counter()
                manager.add_request(
                    job.prompts[i],
                    request_id=str(i),
                    max_new_tokens=job.answers[i],
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if len(result.generated_tokens) != job.answers[int(result.request_id)]:
                    raise RuntimeError(f"continuous batching: {result.error or 'too few tokens'}")
                times[result.request_id] = result.timestamps
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended by itself")
    keys = [str(i) for i in range(len(job.prompts))]
    ttft = [times[k][0] - sent[k] for k in keys]
    tpot = [(times[k][-1] - times[k][0]) / max(1, len(times[k]) - 1) for k in keys]
    return ttft, tpot


if __name__ == "__main__":
    main()
