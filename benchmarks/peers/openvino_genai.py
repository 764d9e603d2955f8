"""OpenVINO as a contender, run by the interpreter of its own virtual environment.

One sequence goes through GenAI's `LLMPipeline`. Eight sequences and verification drive the
exported model directly: it is faster than GenAI's batching, and GenAI has no call that
returns the logits of several rows. Only one of the two is in memory at a time.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.protocol import Contender, Job, NotComparableError, median_seconds, serve
from tools.peers import places

FILL = 64


class OpenVino:
    """An exported model; every prompt is new, because GenAI caches prefixes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._folder = places.openvino_folder(job.model, job.form)
        if not self._folder.exists():
            raise NotComparableError(f"{self._folder.name} is not there")
        self._random = np.random.default_rng(0)
        self._options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline: Any = None
        self._raw: _Raw | None = None

    def decode(self, batch: int) -> float:
        """GenAI's mean time per output token, or the raw model's loop for several."""
        job = self._job
        if batch == 1:
            return 1000.0 / self._generate(job.prompt, job.new).get_tpot().mean
        raw = self._get_raw()
        raw.reset()
        token = raw.forward(self._tokens(batch, job.prompt_for(batch)))[:, -1:].argmax(-1)
        began = time.perf_counter()
        for _ in range(job.new):
            token = raw.forward(token)[:, -1:].argmax(-1)
        return batch * job.new / (time.perf_counter() - began)

    def prefill(self) -> float:
        """GenAI's time to first token (the raw model computes logits for all positions)."""
        length = self._job.prefill
        return 1000.0 * length / self._generate(length, 1).get_ttft().mean

    def verify(self, rows: Sequence[int]) -> list[float]:
        """Forward passes over a filled context, which they lengthen by their own rows.

        The exported model has no way to take rows back. Filling it anew for each number of
        rows would take far longer than the passes, because it computes all logits.
        """
        raw, context = self._get_raw(), self._job.context
        raw.reset()
        for start in range(0, context, FILL):
            raw.forward(self._tokens(1, min(FILL, context - start)))

        def once(count: int) -> None:
            raw.forward(self._tokens(1, count)).argmax(-1)

        return [median_seconds(lambda count=count: once(count)) for count in rows]

    def facts(self) -> dict[str, float]:
        """Bytes of the exported weights."""
        return {"weight_bytes": float((self._folder / "openvino_model.bin").stat().st_size)}

    def _tokens(self, batch: int, length: int) -> Any:
        return self._random.integers(0, self._job.vocab_size - 10, (batch, length), dtype=np.int64)

    def _generate(self, prompt: int, new: int) -> Any:
        if self._pipeline is None:
            self._raw = None
            gc.collect()
            self._pipeline = openvino_genai.LLMPipeline(str(self._folder), "CPU", **self._options)
            self._generate(16, 8)
            self._generate(self._job.prefill, 1)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        tokens = self._tokens(1, prompt)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens))
        )
        return self._pipeline.generate(inputs, config).perf_metrics

    def _get_raw(self) -> _Raw:
        if self._raw is None:
            self._pipeline = None
            gc.collect()
            self._raw = _Raw(str(self._folder / "openvino_model.xml"), self._options)
        return self._raw


class _Raw:
    """The stateful model itself: tokens in, logits ``[B, T, V]`` of every position out."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        compiled = openvino.Core().compile_model(path, "CPU", options)
        self._request = compiled.create_infer_request()
        self._names = {port.get_any_name() for port in compiled.inputs}
        self._past = 0

    def reset(self) -> None:
        self._request.reset_state()
        self._past = 0

    def forward(self, tokens: Any) -> Any:
        batch, count = tokens.shape
        end = self._past + count
        feed = {"input_ids": tokens, "attention_mask": np.ones((batch, end), np.int64)}
        if "position_ids" in self._names:
            feed["position_ids"] = np.tile(np.arange(self._past, end, dtype=np.int64), (batch, 1))
        if "beam_idx" in self._names:
            feed["beam_idx"] = np.arange(batch, dtype=np.int32)
        self._request.infer(feed)
        self._past = end
        return self._request.get_output_tensor(0).data


def load(job: Job) -> Contender:
    """Models are loaded when a task first needs them."""
    return OpenVino(job)


if __name__ == "__main__":
    sys.exit(serve(load))
