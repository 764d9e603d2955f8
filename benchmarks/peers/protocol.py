"""What every contender of `benchmarks.decode` is told and answers.

A contender runs as a process of its own. Its standard input brings a `Job` as one line of
JSON; it loads the model and answers ``{"ready": facts}``; then each further line names a task
and is answered by one line. Between tasks it waits, so that the machine's limits can be
probed. Standard library only: it is imported by interpreters that have nothing else of ours.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

VERIFY_ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Job:
    """One model in one format.

    Attributes:
        model: the model's name, such as ``llama-3.2-1b``.
        form: ``bf16``, ``int8`` or ``int4``.
        vocab_size: prompts are random token ids below it.
        threads: to compute with.
        new: tokens to decode after a prompt of ``prompt``.
        prompt8: prompt of each of eight sequences.
        prefill: length of the prompt whose prefill is timed; a new one every time.
        context: cached tokens under the rows that are verified.
    """

    model: str
    form: str
    vocab_size: int
    threads: int
    new: int = 128
    prompt: int = 128
    prompt8: int = 128
    prefill: int = 512
    context: int = 512

    def prompt_for(self, batch: int) -> int:
        """Prompt tokens of each of ``batch`` sequences."""
        return self.prompt if batch == 1 else self.prompt8


class NotComparableError(Exception):
    """A contender has no way to do a task, or a format: its cell stays empty, and says why."""


class Contender(Protocol):
    """A loaded, warmed-up model.

    A method that a peer has no way to do raises `NotComparableError`.
    """

    def decode(self, batch: int) -> float:
        """Greedy tokens per second of ``batch`` sequences together, prefill not counted."""
        ...

    def prefill(self) -> float:
        """Prompt tokens per second, logits for the last one."""
        ...

    def verify(self, rows: Sequence[int]) -> list[float]:
        """Median seconds of one forward pass over each number of rows, logits for all."""
        ...

    def facts(self) -> dict[str, float]:
        """What else is worth a note, after the tasks: weight bytes, overheads."""
        ...


def median_seconds(call: Callable[[], object], *, enough_s: float = 0.8) -> float:
    """Median of 3 to 9 timed calls after one that warms up; fewer where they are slow."""
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < 9 and sum(seconds) < enough_s):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


TASKS: dict[str, Callable[[Contender], Any]] = {
    "decode1": lambda c: c.decode(1),
    "decode8": lambda c: c.decode(8),
    "prefill": lambda c: c.prefill(),
    "verify": lambda c: c.verify(VERIFY_ROWS),
    "facts": lambda c: c.facts(),
}


def serve(load: Callable[[Job], Contender]) -> None:
    """The contender's whole life: its job, then tasks until the input ends.

    What a library prints goes to standard error, whatever it prints with.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    job = Job(**json.loads(sys.stdin.readline()))
    try:
        contender = load(job)
    except NotComparableError as missing:
        say(unable=str(missing))
        return
    say(ready=True)
    for line in sys.stdin:
        try:
            say(value=TASKS[line.strip()](contender))
        except NotComparableError as missing:
            say(unable=str(missing))
