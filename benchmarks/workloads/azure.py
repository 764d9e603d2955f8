"""Request lengths of the Azure LLM inference traces (2023), conversation and code.

The traces hold lengths and times only; text of the wanted length comes from the WikiText-2
validation set (measuring only, never training). Lengths are divided by a stated factor,
since the traces come from large GPU clusters; their ratios stay.
"""

from __future__ import annotations

import csv
import functools
import gzip
import random
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Lengths:
    """Prompt and answer length of one request, in tokens."""

    prompt: int
    answer: int


def azure_lengths(
    count: int, *, divide: float, max_context: int, seed: int, trace: str = "conv"
) -> list[Lengths]:
    """``count`` requests drawn in trace order from a random place.

    Args:
        count: how many.
        divide: lengths are divided by this.
        max_context: longest prompt plus answer; longer requests are left out.
        seed: decides the place.
        trace: ``conv`` or ``code``.
    """
    with gzip.open(DATA / "azure_llm_2023" / f"{trace}.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    start = random.Random(seed).randrange(len(rows) - 4 * count)
    found: list[Lengths] = []
    for row in rows[start:]:
        prompt = max(4, round(int(row["ContextTokens"]) / divide))
        answer = max(4, round(int(row["GeneratedTokens"]) / divide))
        if prompt + answer <= max_context:
            found.append(Lengths(prompt, answer))
        if len(found) == count:
            return found
    raise ValueError(f"the {trace} trace has not {count} requests that fit {max_context} tokens")


def text_tokens(count: int, vocab_size: int, seed: int) -> list[int]:
    """Bytes of real text as token ids below ``vocab_size``: distinct prompts of any length."""
    text = _text()
    start = random.Random(seed).randrange(len(text) - count - 1)
    return [4 + byte % (vocab_size - 4) for byte in text[start : start + count]]


@functools.cache
def _text() -> bytes:
    with gzip.open(DATA / "wikitext2" / "valid.txt.gz", "rb") as file:
        return file.read()
