"""``python -m benchmarks.start [--quick]``: from the command to the first served request.

Starts ``coppice serve`` on a random-weight Qwen2.5-0.5B shape in each format, first with an
empty cache folder, then again; the clock runs from process creation to the line that says
ready, which a health request then confirms. Resident memory is that of both processes. A bare
``import torch`` is timed between the starts: Coppice's own part is what is left.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quiet import wait_until_quiet
from benchmarks.report import Goal, Report
from tools.peers.models import make_checkpoint

MODEL = "qwen2.5-0.5b"
FORMATS = ("none", "int8", "int4")
KV_MIB = 256
SECONDS, OVERHEAD_MIB, WEIGHT_SLACK = 1.5, 300, 1.05
COMMAND = (sys.executable, "-m", "coppice", "serve")


@dataclass(frozen=True)
class Start:
    """One start: seconds until ready, MiB of both processes, MiB of packed weights."""

    seconds: float
    resident_mib: float
    weights_mib: float


def start(model: Path, quantization: str, cache: Path) -> Start:
    """Start the server, look at it, stop it."""
    command = [*COMMAND, str(model), "--port", "0", "--cache-dir", str(cache)]
    command += ["--kv-cache-mib", str(KV_MIB), "--quantization", quantization]
    began = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        seconds = time.perf_counter() - began
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"coppice serve ended: {line!r}")
        with urllib.request.urlopen(found[0] + "/health") as reply:
            if reply.status != 200:
                raise RuntimeError(f"not ready after all: {reply.status}")
        resident = sum(_resident_mib(pid) for pid in (server.pid, *_children(server.pid)))
    finally:
        for _ in range(2):  # the second signal cuts the drain short
            server.send_signal(signal.SIGINT)
            time.sleep(0.05)
        server.wait(30)
    packed = sum(path.stat().st_size for path in cache.glob("packs/*.pack"))
    return Start(seconds, resident, packed / 2**20)


def import_seconds() -> float:
    """A Python that imports PyTorch and leaves at once."""
    code = "import torch, os; os._exit(0)"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def _children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _resident_mib(pid: int) -> float:
    """MiB of a process, pages shared with others counted in part."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> int:
    """Run it; the exit status tells whether every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three starts a format, not seven")
    rounds = 3 if parser.parse_args().quick else 7
    model = make_checkpoint(MODEL)
    columns = ["format", "first s", "second s", "import torch s", "resident MiB", "bound MiB"]
    report = Report("start", columns)
    for quantization in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            wait_until_quiet()
            first = start(model, quantization, Path(folder))
            again, bare = [], []
            for _ in range(rounds):
                wait_until_quiet()
                bare.append(import_seconds())
                again.append(start(model, quantization, Path(folder)))
        _add(report, "bf16" if quantization == "none" else quantization, first, again, bare)
    return report.finish()


def _add(report: Report, name: str, first: Start, again: list[Start], bare: list[float]) -> None:
    second = statistics.median(s.seconds for s in again)
    resident = max(s.resident_mib for s in again)
    bound = WEIGHT_SLACK * first.weights_mib + KV_MIB + OVERHEAD_MIB
    floor = statistics.median(bare)
    figures = (first.seconds, second, floor, resident, bound)
    report.rows.append([name, *(f"{figure:.2f}" for figure in figures)])
    report.metrics[name] = {
        "first_s": first.seconds,
        "second_s": [s.seconds for s in again],
        "import_torch_s": bare,
        "resident_mib": resident,
        "weights_mib": first.weights_mib,
    }
    report.goals.append(Goal.at_most(f"{name}: second start, s", second, SECONDS))
    report.goals.append(Goal.at_most(f"{name}: resident MiB", resident, bound))


if __name__ == "__main__":
    sys.exit(main())
