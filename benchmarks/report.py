"""What every benchmark prints and keeps: a table, goals, the machine, the commit."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """One figure of an issue, met or not."""

    name: str
    value: float | None
    bound: str
    met: bool
    note: str = ""

    @classmethod
    def at_least(cls, name: str, value: float, bound: float) -> Goal:
        """``value >= bound``."""
        return cls(name, round(value, 4), f">= {bound:g}", value >= bound)

    @classmethod
    def at_most(cls, name: str, value: float, bound: float) -> Goal:
        """``value <= bound``."""
        return cls(name, round(value, 4), f"<= {bound:g}", value <= bound)

    @classmethod
    def unmeasured(cls, name: str, bound: str, why: str) -> Goal:
        """No figure, so not met."""
        return cls(name, None, bound, False, why)


@dataclass
class Report:
    """Collects rows and goals of one benchmark run."""

    benchmark: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def finish(self) -> int:
        """Print table, goals and the JSON line; keep it; 0 when every goal is met."""
        console = Console(width=130)
        table = Table(*self.columns, title=self.benchmark)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for goal in self.goals:
            mark = "met" if goal.met else "NOT MET"
            value = "not measured" if goal.value is None else f"{goal.value:g}"
            why = f"; {goal.note}" if goal.note else ""
            console.print(f"{mark:8} {goal.name}: {value} (bound {goal.bound}{why})", markup=False)
        document = {
            "benchmark": self.benchmark,
            "commit": _commit(),
            "machine": machine(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": _plain(self.metrics),
            "goals": _plain([asdict(goal) for goal in self.goals]),
        }
        RESULTS.mkdir(exist_ok=True)
        name = f"{self.benchmark}-{machine()['name']}.json"
        (RESULTS / name).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        print(json.dumps(document, allow_nan=False))
        return 0 if all(goal.met for goal in self.goals) else 1


def _plain(value: Any) -> Any:
    """As strict JSON has it: figures there are none of are null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """Processor, cores, instruction sets and memory: enough to tell two machines apart."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in info.splitlines())
    )
    flags = set(facts.get("flags", "").split())
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags]
    model = facts.get("model name", platform.processor() or platform.machine())
    family = f"{facts.get('cpu family', '')}.{facts.get('model', '')}"
    cores = len(os.sched_getaffinity(0))
    slug = "-".join(model.lower().replace("(", " ").replace(")", " ").split()[:3])
    return {
        "name": f"{slug}-{family}-{cores}c",
        "processor": model,
        "family": family,
        "cores": cores,
        "isa": wide,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
    }


def _commit() -> str:
    """The commit measured, with `-dirty` where its files were changed, kept results aside."""
    name = _git("describe", "--always") or "unknown"
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":/!benchmarks/results")
    return f"{name}-dirty" if changed else name


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
