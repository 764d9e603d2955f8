"""Recorded agents as turns and tools: tau-bench's airline runs and SWE-agent's.

Lengths are characters over four. tau-bench records no times: tools are drawn log-normal with a
median of their name's own between 0.1 and 3 s (spread e), a person's answer with median 4 s.
SWE-agent records some; the others are drawn from what is recorded.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import statistics
import zlib
from collections.abc import Iterator
from typing import Any

from benchmarks.workloads.azure import DATA
from coppice.scheduling.agents import Agent, Turn

CHARACTERS_PER_TOKEN = 4
TAU_SYSTEM_TOKENS = 6155 // CHARACTERS_PER_TOKEN
PERSON_S = 4.0


def tau_bench() -> list[list[Turn]]:
    """136 runs of 3 to 30 turns."""
    with gzip.open(DATA / "tau_bench" / "airline_gpt4o.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rng = random.Random(1)
    found = []
    for row in rows:
        turns: list[Turn] = []
        added = 0
        for message, after in zip(row["traj"], [*row["traj"][1:], {}], strict=True):
            if message["role"] != "assistant":
                added += _tokens(message)
                continue
            tool = after.get("name") or ("person" if after else "")
            turns.append(
                Turn(max(1, added), max(2, _tokens(message)), tool, _tau_seconds(tool, rng),
                     on_cpu=tool != "person")
            )  # fmt: skip
            added = 0
        if turns:
            found.append([*turns[:-1], turns[-1]._replace(tool="", tool_s=0.0)])
    return found


def swe_agent(runs: int = 120) -> list[list[Turn]]:
    """The six recorded runs of 11 to 13 steps in turn; times not recorded are drawn anew."""
    records = []
    for path in sorted((DATA / "swe_agent").glob("marshmallow*")):
        with gzip.open(path, "rt") as file:
            records.append(json.load(file))
    recorded = [math.log(s) for record in records for s in _seconds(record)]
    mean, sigma = statistics.mean(recorded), statistics.stdev(recorded)
    rng = random.Random(2)
    found = []
    for index in range(runs):
        record = records[index % len(records)]
        added = sum(map(_tokens, record["history"][:2]))
        turns = []
        for step in record["trajectory"]:
            seconds = step.get("execution_time") or rng.lognormvariate(mean, sigma)
            tool = str(step["action"]).split(maxsplit=1)[0]
            answer = max(2, len(step["response"] or step["action"]) // CHARACTERS_PER_TOKEN)
            turns.append(Turn(added, answer, tool, seconds))
            added = max(1, len(step["observation"]) // CHARACTERS_PER_TOKEN)
        found.append([*turns[:-1], turns[-1]._replace(tool="", tool_s=0.0)])
    return found


def agents(
    runs: list[list[Turn]], rate: float, count: int, *, shared_tokens: int, seed: int = 1
) -> list[Agent]:
    """``count`` sessions, drawn in turn from ``runs`` in random order, at ``rate`` a second.

    All at once where the rate is infinite. The first ``shared_tokens`` are the same in all.
    """
    rng = random.Random(seed)
    order = [i % len(runs) for i in range(count)]
    rng.shuffle(order)
    now, made = 0.0, []
    for index, which in enumerate(order):
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
        made.append(
            Agent(index=index, begins_s=now, turns=runs[which], shared_tokens=shared_tokens)
        )
    return made


def _tokens(message: dict[str, Any]) -> int:
    text = str(message.get("content") or "")
    calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
    return (len(text) + len(calls)) // CHARACTERS_PER_TOKEN


def _seconds(record: dict[str, Any]) -> Iterator[float]:
    return (s["execution_time"] for s in record["trajectory"] if s.get("execution_time"))


def _tau_seconds(tool: str, rng: random.Random) -> float:
    if not tool:
        return 0.0
    place = zlib.crc32(tool.encode()) / 2**32
    median = PERSON_S if tool == "person" else 0.1 * 30.0**place
    return rng.lognormvariate(math.log(median), 1.0)
