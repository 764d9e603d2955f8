"""Twenty workloads: texts that repeat and texts that cannot, alone and in batches."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[3] / "shared" / "data"
PROMPT = 96

Encode = Callable[[str], list[int]]
KINDS = ("random", "prose", "code", "chat", "repeats")


@dataclass(frozen=True)
class Workload:
    """What is decoded together.

    Attributes:
        kind: of `KINDS`.
        batch: sequences.
        temperature: 0 is greedy.
    """

    kind: str
    batch: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.kind} x{self.batch} t={self.temperature:g}"


WORKLOADS = tuple(
    Workload(kind, batch, temperature)
    for kind, batch, temperature in [
        *((kind, 1, 0.0) for kind in KINDS),
        *((kind, 1, 0.8) for kind in KINDS),
        ("random", 2, 1.0),
        ("prose", 4, 0.0),
        ("code", 4, 0.8),
        ("random", 8, 1.0),
        ("prose", 8, 0.8),
        ("repeats", 8, 0.0),
        ("chat", 16, 0.8),
        ("random", 32, 1.0),
        ("code", 32, 0.0),
        ("repeats", 32, 0.8),
    ]
)


class Prompts:
    """Never the same prompt twice, or the history would know the answer.

    Raises:
        FileNotFoundError: the data folder is not there.
    """

    def __init__(self, encode: Encode, vocab_size: int) -> None:
        if not DATA.is_dir():
            raise FileNotFoundError(
                f"The texts are not at {DATA}; put the data folder there (a folder 'shared' "
                "beside the repository) and run this again."
            )
        self._encode = encode
        self._vocab_size = vocab_size
        self._random = random.Random(7)
        with gzip.open(DATA / "wikitext2" / "valid.txt.gz", "rt") as file:
            self._prose = file.read()
        lines = (DATA / "mbpp" / "mbpp.jsonl").read_text().splitlines()
        self._code = "\n".join(json.loads(line)["code"] for line in lines)
        lines = (DATA / "arena_hard" / "question.jsonl").read_text().splitlines()
        self._chat = "\n\n".join(json.loads(line)["prompt"] for line in lines)

    def draw(self, workload: Workload) -> list[list[int]]:
        """New prompts, one for each sequence."""
        return [self._one(workload.kind) for _ in range(workload.batch)]

    def _one(self, kind: str) -> list[int]:
        draw = self._random
        if kind == "random":
            return [draw.randrange(5, self._vocab_size) for _ in range(PROMPT)]
        if kind == "repeats":
            words = " ".join(draw.choice(self._prose.split(" ", 2000)[:2000]) for _ in range(12))
            return self._encode((words + "\n") * 6)[-PROMPT:]
        text = {"prose": self._prose, "code": self._code, "chat": self._chat}[kind]
        at = draw.randrange(len(text) - 8 * PROMPT)
        return self._encode(text[at : at + 8 * PROMPT])[:PROMPT]
