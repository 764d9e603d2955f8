"""Arrival streams of real services: Azure, Mooncake, VTC and AdaServe, told by their fields.

A trace has times and lengths only, no text. Lengths and the pace can be divided to bring what
a cluster served down to a smaller engine; ratios stay.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from coppice.errors import ConfigError
from coppice.scheduling.virtual import VirtualSequence

CHARACTERS_PER_TOKEN = 4.0
MOST_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        time_s: since the first of the trace.
        prompt: tokens.
        answer: tokens.
        tenant: who asked.
        slo: as AdaServe's traces have it: a multiple of the base decode latency, or, negative,
            milliseconds a token; None where the trace has none.
        blocks: names of equal prefixes, 512 tokens each.
    """

    time_s: float
    prompt: int
    answer: int
    tenant: str = "default"
    slo: float | None = None
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """A trace file, plain or gzip, sorted by time.

    Raises:
        ConfigError: it is missing, empty or of no known form, or a line of it is damaged.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = list(_rows(path, text.splitlines()))
        arrivals = list(_arrivals(path, rows))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"Cannot read the trace {path}: {error}.", param="trace") from error
    if not arrivals:
        raise ConfigError(f"The trace {path} holds no request.", param="trace")
    first = min(a.time_s for a in arrivals)
    moved = [Arrival(a.time_s - first, *_rest(a)) for a in arrivals]
    return sorted(moved, key=lambda a: a.time_s)


def as_sequences(
    arrivals: Iterable[Arrival],
    *,
    divide: float = 1.0,
    pace: float = 1.0,
    max_context: int = MOST_TOKENS,
    base_tpot_s: float | None = None,
    ttft_s: float | None = None,
) -> list[VirtualSequence]:
    """Sequences to play.

    Args:
        arrivals: of a trace.
        divide: lengths are divided by this; at least one token stays.
        pace: times are divided by this: 2 plays twice as fast.
        max_context: requests longer than this are left out.
        base_tpot_s: base decode latency; where the trace has wishes for time a token, they are
            made of it.
        ttft_s: wish for the first token of every request.
    """
    made: list[VirtualSequence] = []
    for a in arrivals:
        prompt = max(1, round(a.prompt / divide))
        answer = max(1, round(a.answer / divide))
        if prompt + answer > max_context:
            continue
        tpot = None
        if a.slo is not None and base_tpot_s is not None:
            tpot = a.slo * base_tpot_s if a.slo > 0 else -a.slo / 1e3
        made.append(
            VirtualSequence(
                arrival=len(made),
                num_prompt=prompt,
                num_answer=answer,
                submitted_s=a.time_s / pace,
                tenant=a.tenant,
                tpot_s=tpot,
                ttft_s=ttft_s,
                blocks=a.blocks if divide == 1.0 else (),
            )
        )
    return made


def _rest(a: Arrival) -> tuple[int, int, str, float | None, tuple[int, ...]]:
    return a.prompt, a.answer, a.tenant, a.slo, a.blocks


def _rows(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    if ".jsonl" in path.name:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _damaged(path, number, str(error)) from error
            if not isinstance(row, dict):
                raise _damaged(path, number, "not an object")
            yield row
    else:
        yield from csv.DictReader(lines)


def _arrivals(path: Path, rows: list[dict[str, Any]]) -> Iterator[Arrival]:
    make = _reader(path, rows[0]) if rows else None
    for number, row in enumerate(rows, 1):
        assert make is not None
        try:
            arrival = make(row)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, number, str(error)) from error
        if not (0 < arrival.prompt <= MOST_TOKENS and 0 <= arrival.answer <= MOST_TOKENS):
            raise _damaged(path, number, "lengths out of range")
        yield arrival


def _reader(path: Path, row: dict[str, Any]) -> Callable[[dict[str, Any]], Arrival]:
    fields = set(row)
    if "ContextTokens" in fields:
        return _azure
    if "hash_ids" in fields:
        return _mooncake
    if "adapter_dir" in fields:
        return _vtc
    if "slo_ratio" in fields:
        # One file of the set counts characters; the others say their rate in the name.
        per_token = CHARACTERS_PER_TOKEN if "fluc" in path.name else 1.0
        return lambda row: _adaserve(row, per_token)
    raise ConfigError(
        f"{path} is no trace known here: it must have the fields of an Azure, Mooncake, VTC or "
        "AdaServe trace.",
        param="trace",
    )


def _azure(row: dict[str, Any]) -> Arrival:
    stamp, _, fraction = row["TIMESTAMP"].partition(".")
    seconds = datetime.fromisoformat(stamp).timestamp() + float(f"0.{fraction or 0}")
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(row: dict[str, Any]) -> Arrival:
    return Arrival(
        float(row["timestamp"]) / 1e3,
        int(row["input_length"]),
        int(row["output_length"]),
        blocks=tuple(int(name) for name in row["hash_ids"]),
    )


def _vtc(row: dict[str, Any]) -> Arrival:
    return Arrival(
        float(row["req_time"]),
        int(row["prompt_len"]),
        int(row["output_len"]),
        tenant=row["adapter_dir"],
    )


def _adaserve(row: dict[str, Any], per_token: float) -> Arrival:
    return Arrival(
        float(row["emission_time_ms"]) / 1e3,
        max(1, round(float(row["input_length"]) / per_token)),
        int(row["output_length"]),
        slo=float(row["slo_ratio"]),
    )


def _damaged(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"{path}, request {number}: {what}.", param="trace")
