"""`transformers` as a contender: eager SDPA, a bare greedy loop over a `DynamicCache`.

The loop is a little faster than the library's own `generate`. Where bf16 is emulated the
model runs in float32, which is faster there (``facts`` says which).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.protocol import Contender, Job, NotComparableError, median_seconds, serve
from benchmarks.report import machine
from tools.peers import places


class Transformers:
    """The checkpoint as it is."""

    def __init__(self, job: Job) -> None:
        if job.form != "bf16":
            raise NotComparableError("only its bf16 checkpoint is compared")
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        fast_bf16 = {"avx512_bf16", "amx_tile"} & set(machine()["isa"])
        self._dtype = torch.bfloat16 if fast_bf16 else torch.float32
        self._model = AutoModelForCausalLM.from_pretrained(
            places.checkpoint(job.model), dtype=self._dtype, attn_implementation="sdpa"
        ).eval()
        self._job = job
        self._step(self._tokens(1, 16), self._cache())

    def decode(self, batch: int) -> float:
        """A greedy loop after one prefill."""
        cache = self._cache()
        token = self._step(self._tokens(batch, self._job.prompt_for(batch)), cache)
        began = time.perf_counter()
        for _ in range(self._job.new):
            token = self._step(token, cache)
        return batch * self._job.new / (time.perf_counter() - began)

    def prefill(self) -> float:
        """One forward pass over a fresh prompt."""
        length = self._job.prefill
        tokens = self._tokens(1, length)
        return length / median_seconds(lambda: self._step(tokens, self._cache()))

    def verify(self, rows: Sequence[int]) -> list[float]:
        """Forward passes over a cache that is cropped back each time."""
        cache, context = self._cache(), self._job.context
        self._step(self._tokens(1, context), cache)

        def once(tokens: Tensor) -> None:
            self._model(tokens, past_key_values=cache).logits.argmax(-1)
            cache.crop(-tokens.shape[1])

        drafts = [self._tokens(1, count) for count in rows]
        return [median_seconds(lambda tokens=tokens: once(tokens)) for tokens in drafts]

    def facts(self) -> dict[str, float]:
        """Bytes of the weights in memory."""
        size = sum(p.numel() * p.element_size() for p in self._model.parameters())
        return {"weight_bytes": float(size), "float32": float(self._dtype == torch.float32)}

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def _tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(0, self._job.vocab_size - 10, (batch, length))

    def _step(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        logits = self._model(tokens, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def load(job: Job) -> Contender:
    """Load and run once."""
    return Transformers(job)


if __name__ == "__main__":
    sys.exit(serve(load))
