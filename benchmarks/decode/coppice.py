"""Coppice as a contender: the engine in process; verification is one forward pass."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Sequence
from itertools import count

import torch

from benchmarks.peers.protocol import Contender, Job, NotComparableError, median_seconds, serve
from coppice.cache.pool import KVPool
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.errors import CoppiceError
from coppice.kernels.rows import Rows
from tools.peers import places

CHUNK = 256


class Coppice:
    """The engine over a checkpoint; ``form`` other than bf16 is its ``quantization``."""

    def __init__(self, job: Job) -> None:
        settings: dict[str, object] = {} if job.form == "bf16" else {"quantization": job.form}
        try:
            config = EngineConfig.from_values(
                model=str(places.checkpoint(job.model)),
                dtype="bfloat16",
                kv_cache_mib=512,
                prefix_cache=False,
                num_threads=job.threads,
                **settings,
            )
            model = load_engine_model(config)
        except CoppiceError as error:
            raise NotComparableError(error.message) from error
        self._job = job
        self._decoder = model.decoder
        self._engine = Engine(model, config)
        self._random = random.Random(0)
        self._numbers = count()
        self._outside_s, self._steps = 0.0, 0
        gc.freeze()  # as the engine process does
        self._run(2, 16, 4)

    def decode(self, batch: int) -> float:
        """From the moment all have begun to answer until the first is done."""
        before = self._engine.stats()
        rate = self._run(batch, self._job.prompt_for(batch), self._job.new)
        after = self._engine.stats()
        if batch == 1:
            self._outside_s += after.other_s - before.other_s
            self._steps += after.steps - before.steps
        return rate

    def prefill(self) -> float:
        """Submission to first token."""
        began = time.perf_counter()
        self._submit(self._job.prefill, 1)
        while self._engine.has_work:
            self._engine.step()
        return self._job.prefill / (time.perf_counter() - began)

    def verify(self, rows: Sequence[int]) -> list[float]:
        """Rows of one sequence over ``context`` cached tokens, written to the same slots."""
        context = self._job.context
        page_size = self._engine.config.page_size
        num_pages = -(-(context + max(rows)) // page_size)
        pool = KVPool(self._decoder.kv_layout(page_size), num_pages)
        pages = list(range(num_pages))
        for start in range(0, context, CHUNK):
            tokens = self._tokens(min(CHUNK, context - start))
            self._decoder.forward(Rows.chunk(tokens, pages, start), pool)

        def once(draft: Rows) -> None:
            torch.argmax(self._decoder.forward(draft, pool), dim=-1)

        drafts = [Rows.chunk(self._tokens(n), pages, context) for n in rows]
        return [median_seconds(lambda draft=draft: once(draft)) for draft in drafts]

    def facts(self) -> dict[str, float]:
        """Weight bytes read each step, cache bytes per token, time outside the model."""
        layout = self._decoder.kv_layout(16)
        return {
            "weight_bytes": float(self._engine.facts().weight_bytes),
            "kv_bytes_per_token": layout.page_bytes / layout.page_size,
            "outside_model_us": 1e6 * self._outside_s / max(1, self._steps),
        }

    def _tokens(self, length: int) -> list[int]:
        return [self._random.randrange(self._job.vocab_size - 10) for _ in range(length)]

    def _submit(self, prompt: int, new: int) -> str:
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        name = str(next(self._numbers))
        self._engine.submit(Request(id=name, prompt=self._tokens(prompt), sampling=params))
        return name

    def _run(self, batch: int, prompt: int, new: int) -> float:
        waiting = {self._submit(prompt, new + 1) for _ in range(batch)}
        tokens, began, rate = 0, 0.0, 0.0
        while self._engine.has_work:
            outputs = self._engine.step()
            tokens += sum(len(output.tokens) for output in outputs)
            if not rate and any(output.finish_reason is not None for output in outputs):
                rate = tokens / (time.perf_counter() - began)
            if waiting:
                waiting -= {output.request_id for output in outputs}
                tokens, began = 0, time.perf_counter()
        return rate


def load(job: Job) -> Contender:
    """Load and run once."""
    return Coppice(job)


if __name__ == "__main__":
    sys.exit(serve(load))
