"""What a contender is given and what it must answer: JSON in, JSON out, one process each."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One closed-loop run: at most ``concurrency`` requests at once, in order.

    Attributes:
        model: checkpoint folder.
        dtype: ``float32`` or ``bfloat16``.
        prompts: token ids of each request.
        answers: tokens each request must generate (EOS ignored, greedy).
        mode: how the contender batches, where it has a choice.
    """

    model: str
    dtype: str
    concurrency: int
    prompts: list[list[int]]
    answers: list[int]
    mode: str = ""


@dataclass(frozen=True)
class Measured:
    """What a contender did.

    Attributes:
        seconds: first request submitted to last token.
        ttft_s, tpot_s: per request; TPOT is the mean gap after the first token.
        extra: figures only this contender has.
    """

    seconds: float
    ttft_s: list[float]
    tpot_s: list[float]
    extra: dict[str, float]

    def summary(self, job: Job) -> dict[str, float]:
        """Throughput and medians."""
        return {
            "output_tok_s": sum(job.answers) / self.seconds,
            "total_tok_s": (sum(job.answers) + sum(map(len, job.prompts))) / self.seconds,
            "ttft_p50_s": statistics.median(self.ttft_s),
            "tpot_p50_ms": 1e3 * statistics.median(self.tpot_s),
            **self.extra,
        }


def run_contender(module: str, job: Job, timeout_s: float = 1200.0) -> Measured:
    """Run ``python -m module`` on a job, alone, and read its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Measured(**answer)


def read_job() -> Job:
    """The contender's side: its job from standard input."""
    return Job(**json.load(sys.stdin))


def write_measured(measured: Measured) -> None:
    """The contender's side: its answer."""
    print(json.dumps(asdict(measured)))
