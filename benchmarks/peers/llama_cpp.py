"""llama.cpp as a contender: its own benchmark programs, started for each task.

Decoding alone and prefill are `llama-bench`, eight sequences `llama-batched-bench`.
Verification is `verify.cpp` beside `make peers`: one sequence, logits for all rows, which
neither of its programs measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.protocol import Contender, Job, NotComparableError, serve
from tools.peers import places
from tools.peers.models import GGUF_FORMS


class LlamaCpp:
    """The programs with one GGUF file. Nothing stays loaded between tasks."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._file = places.gguf(job.model, GGUF_FORMS[job.form])
        if not self._file.exists():
            raise NotComparableError(f"{self._file.name} is not there")

    def decode(self, batch: int) -> float:
        """``llama-bench -d PROMPT -n NEW``, or ``llama-batched-bench`` for more than one."""
        job = self._job
        if batch == 1:
            out = self._run("llama-bench", "-p 0 -r 1 -o jsonl", n=job.new, d=job.prompt)
            return bench_rate(out)
        prompt = job.prompt_for(batch)
        out = self._run(
            "llama-batched-bench",
            "-b 2048 -ub 512 --output-format jsonl",
            c=batch * (prompt + job.new),
            npp=prompt,
            ntg=job.new,
            npl=batch,
        )
        return batched_rate(out)

    def prefill(self) -> float:
        """``llama-bench -p PREFILL``; it runs once unmeasured before."""
        return bench_rate(self._run("llama-bench", "-n 0 -r 1 -o jsonl", p=self._job.prefill))

    def verify(self, rows: Sequence[int]) -> list[float]:
        """Our own program over its library; see `verify.cpp`."""
        tool = places.llama_tool("verify")
        if not tool.exists():
            raise NotComparableError("its verification program was not built")
        job = self._job
        numbers = [str(n) for n in (job.threads, job.context, *rows)]
        done = subprocess.run(
            [tool, self._file, *numbers], stdout=subprocess.PIPE, text=True, check=True
        )
        return [float(line) for line in done.stdout.split()]

    def facts(self) -> dict[str, float]:
        """Bytes of the file, nearly all of them weights."""
        return {"weight_bytes": float(self._file.stat().st_size)}

    def _run(self, tool: str, options: str, **numbers: int) -> str:
        command: list[str | Path] = [places.llama_tool(tool), "-m", self._file]
        command += ["-t", str(self._job.threads), *options.split()]
        for flag, value in numbers.items():
            command += [f"-{flag}", str(value)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout


def bench_rate(text: str) -> float:
    """Tokens per second of the one test in ``llama-bench -o jsonl`` output."""
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    return float(json.loads(line)["avg_ts"])


def batched_rate(text: str) -> float:
    """Decoded tokens per second of the one test in ``llama-batched-bench`` output."""
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    return float(json.loads(line)["speed_tg"])


def load(job: Job) -> Contender:
    """Nothing is loaded yet."""
    return LlamaCpp(job)


if __name__ == "__main__":
    sys.exit(serve(load))
