"""vLLM's CPU backend as a contender, eager, run by the interpreter of its own environment."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence

from benchmarks.peers.protocol import Contender, Job, NotComparableError, serve
from tools.peers import places

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Vllm:
    """The checkpoint in bf16 behind vLLM's engine, its prefix cache off."""

    def __init__(self, job: Job) -> None:
        if job.form != "bf16":
            raise NotComparableError("its quantized modes are not compared")
        os.environ.update(SETTINGS, VLLM_CPU_OMP_THREADS_BIND=f"0-{job.threads - 1}")
        import vllm

        self._job = job
        self._params = vllm.SamplingParams
        self._model = vllm.LLM(
            str(places.checkpoint(job.model)),
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=8,
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self._seconds(1, 16, 4)

    def decode(self, batch: int) -> float:
        """The time of long answers less that of one-token answers."""
        prompt, new = self._job.prompt_for(batch), self._job.new
        first = self._seconds(batch, prompt, 1)
        return batch * new / (self._seconds(batch, prompt, new + 1) - first)

    def prefill(self) -> float:
        """A prompt and one token."""
        return self._job.prefill / self._seconds(1, self._job.prefill, 1)

    def verify(self, rows: Sequence[int]) -> list[float]:
        """It has no call for it."""
        raise NotComparableError("it has no call that runs several rows of one sequence")

    def facts(self) -> dict[str, float]:
        """Nothing its interface tells."""
        return {}

    def _seconds(self, batch: int, length: int, new: int) -> float:
        limit = self._job.vocab_size - 10
        prompts = [
            {"prompt_token_ids": [random.randrange(limit) for _ in range(length)]}
            for _ in range(batch)
        ]
        params = self._params(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self._model.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began


def load(job: Job) -> Contender:
    """Load and run once."""
    return Vllm(job)


if __name__ == "__main__":
    sys.exit(serve(load))
