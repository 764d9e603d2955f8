"""The rows people read: every contender's figures beside what the machine gave."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.decode.contest import COPPICE, PEERS, TASKS, Case, Figure
from benchmarks.decode.goals import Judge, median
from benchmarks.peers.protocol import VERIFY_ROWS

COLUMNS = ["model", "task", "contender", "median [min–max]", "n", "GB/s", "probed", "of best peer"]
UNITS = {
    "decode1": "tok/s",
    "decode8": "tok/s",
    "prefill": "tok/s",
    "verify": f"ms at {'/'.join(map(str, VERIFY_ROWS))}",
}


def rows(judge: Judge, model: str, forms: list[str]) -> Iterator[list[str]]:
    """One row per contender, task and format, present or not."""
    for form in forms:
        case = Case(model, form)
        for task in TASKS:
            for entrant in (COPPICE, *PEERS):
                if form in entrant.formats and task in entrant.tasks:
                    figure = judge.figures.get((case, entrant.name, task))
                    yield _row(judge, case, task, entrant.name, figure)


def _row(judge: Judge, case: Case, task: str, name: str, figure: Figure | None) -> list[str]:
    start = [f"{case.model} {case.form}", f"{task}, {UNITS[task]}", _title(judge, case, name)]
    value = median(figure)
    if figure is None or value is None:
        note = figure.note if figure is not None and figure.note else "not run"
        return [*start, note.splitlines()[0][:60], "0", "", "", ""]
    probed = f"{statistics.median(figure.bandwidths) / 1e9:.1f}"
    count = f"{len(figure.values)}{'*' if figure.disturbed else ''}"
    used, ratio = "", ""
    if task == "decode1":
        size = judge.facts.get((case, name), {}).get("weight_bytes")
        used = f"{value * size / 1e9:.1f}" if size else ""
    if task != "verify":
        best = judge.best_peer(case, task)
        ratio = f"{value / best[1]:.2f}" if best else ""
    elif name == COPPICE.name and (over := judge.over_roofline(case)):
        ratio = f"{max(over):.2f}x roofline"
    return [*start, _text(value, figure.values), count, used, probed, ratio]


def _title(judge: Judge, case: Case, name: str) -> str:
    facts = judge.facts.get((case, name), {})
    return f"{name} (float32)" if facts.get("float32") else name


def _text(value: Any, values: list[Any]) -> str:
    if isinstance(value, list):
        return " ".join(f"{1e3 * t:.3g}" for t in value)
    spread = f" [{min(values):.4g}–{max(values):.4g}]" if len(values) > 1 else ""
    return f"{value:.4g}{spread}"


def metrics(judge: Judge, model: str, forms: list[str]) -> dict[str, Any]:
    """The same as data: figures of all rounds with the bandwidth around each."""
    found: dict[str, Any] = {}
    for form in forms:
        case = Case(model, form)
        for task in TASKS:
            for entrant in (COPPICE, *PEERS):
                figure = judge.figures.get((case, entrant.name, task))
                if figure is not None:
                    found[f"{model} {form} {task} {entrant.name}"] = {
                        "median": median(figure),
                        "values": figure.values,
                        "limits": [[asdict(a), asdict(b)] for a, b in figure.limits],
                        "disturbed": figure.disturbed,
                        "note": figure.note[:300],
                    }
        over = judge.over_roofline(case)
        if over is not None:
            found[f"{model} {form} verify over roofline"] = over
    return found
