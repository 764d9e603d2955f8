"""``python -m benchmarks.tiers [--quick]``: time to first token of a long prefix, by tier.

A random-weight Qwen2.5-0.5B shape in int8 reads a prompt of real text: cold; with its pages in
the KV cache; in the RAM tier; on disk with the system's cache of the files emptied, as after a
restart of the machine; and on disk with the files cached. Limits of the same run: the same
segment files read plainly, and as many bytes copied in memory. The peer is llama.cpp's server
with the same shape in q8_0, which saves and restores a slot when told to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.quiet import wait_until_quiet
from benchmarks.report import Goal, Report
from benchmarks.tiers.llama import SlotTimes, slot_times
from benchmarks.workloads.azure import text_tokens
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from tools.peers import places
from tools.peers.models import make_checkpoint

MODEL = "qwen2.5-0.5b"
LEAST_SPEEDUP = 10.0
LEAST_OF_DISK = 0.5
REPEATS = 3
RESOLUTION_S = 5e-3
"""Two medians that are closer are the same; a rate of less time would be made of noise."""


@dataclass
class Times:
    """Seconds to the first token by where the prefix was; limits in bytes a second."""

    tokens: int
    cold: float
    pool: float
    ram: float
    disk: float
    cached_file: float
    page_bytes: int
    disk_read_s: float
    copy_s: float


def first_token(engine: Engine, prompt: list[int], name: str) -> tuple[float, list[int]]:
    """Seconds to the first token, and the eight tokens of the answer."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.submit(Request(id=name, prompt=prompt, sampling=params))
    began, first, tokens = time.perf_counter(), 0.0, []
    while engine.has_work:
        for output in engine.step():
            tokens += output.tokens
            first = first or time.perf_counter() - began
    return first, tokens


def measure(model: EngineModel, config: EngineConfig, folder: Path, prompt: list[int]) -> Times:
    """All tiers for one prompt."""
    with_ram = replace(config, kv_ram_mib=1024, kv_disk_dir=str(folder))
    engine = Engine(model, with_ram)
    first_token(engine, prompt[-100:], "warm")
    cold, expected = first_token(engine, prompt, "cold")

    def again(engine: Engine, between: Callable[[], object]) -> float:
        """Median over some runs with something done before each."""
        found = []
        for i in range(REPEATS):
            between()
            took, tokens = first_token(engine, prompt, f"again-{i}")
            if tokens != expected:
                raise RuntimeError("a tier changed the answer")
            found.append(took)
        return statistics.median(found)

    pool = again(engine, lambda: None)
    ram = again(engine, lambda: engine.pages.tree.evict(1 << 20))
    engine.close()

    engine = Engine(model, replace(config, kv_disk_dir=str(folder)))
    first_token(engine, prompt[-100:], "warm")
    files = sorted((folder / "coppice-kv").glob("*.kv"))

    def forget() -> None:
        engine.pages.tree.evict(1 << 20)
        for path in files:
            drop_cache(path)

    disk = again(engine, forget)
    cached_file = again(engine, lambda: engine.pages.tree.evict(1 << 20))
    (stats,) = engine.stats().tiers
    pages = len(prompt[:-1]) // config.page_size
    if stats.hits < 2 * REPEATS * pages:
        raise RuntimeError(f"only {stats.hits} pages came from disk")
    read = statistics.median(read_plainly(files) for _ in range(REPEATS))
    size = pages * model.decoder.kv_layout(config.page_size).page_bytes
    engine.close()
    total = sum(path.stat().st_size for path in files)
    return Times(
        len(prompt), cold, pool, ram, disk, cached_file, size, total / read, size / copy(size)
    )


def drop_cache(path: Path) -> None:
    """Make the system forget a file's content, so that reading it asks the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def read_plainly(files: list[Path]) -> float:
    """Seconds to read the files from the disk, 4 MiB at a time."""
    buffer = bytearray(4 << 20)
    for path in files:
        drop_cache(path)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def copy(size: int) -> float:
    """Seconds to copy as many bytes by one thread."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers")
    parser.add_argument("--quick", action="store_true", help="2k tokens only")
    parser.add_argument("--sizes", type=int, nargs="*", help="tokens of the prompts")
    args = parser.parse_args()
    sizes = args.sizes or ([2000] if args.quick else [2000, 8000])
    config = EngineConfig(
        model=str(make_checkpoint(MODEL)),
        quantization="int8",
        context_length=max(sizes) + 64,
        kv_cache_mib=256,
    )
    model = load_engine_model(config)
    columns = ["tokens", "cold", "KV cache", "RAM", "disk", "disk, file cached", "MB/s", "limit"]
    report = Report("tiers", [*columns, "llama.cpp cold / restored"])
    for size in sizes:
        wait_until_quiet()
        prompt = text_tokens(size, model.facts.vocab_size, seed=size)
        with tempfile.TemporaryDirectory(dir=places.ROOT.resolve().parent) as folder:
            times = measure(model, config, Path(folder), prompt)
            peer = slot_times(MODEL, prompt, Path(folder), model.facts.num_threads)
        add(report, times, peer)
    return report.finish()


def add(report: Report, times: Times, peer: SlotTimes | None) -> None:
    """A row, its metrics and its goals."""
    rate = times.page_bytes / max(times.disk - times.pool, RESOLUTION_S)
    ram_rate = times.page_bytes / max(times.ram - times.pool, RESOLUTION_S)
    seconds = (times.cold, times.pool, times.ram, times.disk, times.cached_file)
    report.rows.append(
        [
            str(times.tokens),
            *(f"{s * 1e3:.0f} ms" for s in seconds),
            f"RAM {ram_rate / 1e6:.0f}, disk {rate / 1e6:.0f}",
            f"copy {times.copy_s / 1e6:.0f}, read {times.disk_read_s / 1e6:.0f}",
            "not there" if peer is None else f"{peer.cold:.2f} s / {peer.restored * 1e3:.0f} ms",
        ]
    )
    report.metrics[str(times.tokens)] = vars(times) | {
        "ram_rate": ram_rate,
        "disk_rate": rate,
        "peer": None if peer is None else vars(peer),
    }
    name = f"{times.tokens} tokens"
    report.goals += [
        Goal.at_least(f"{name}: RAM before cold", times.cold / times.ram, LEAST_SPEEDUP),
        Goal.at_least(f"{name}: disk before cold", times.cold / times.disk, LEAST_SPEEDUP),
        Goal.at_least(f"{name}: of the disk's own rate", rate / times.disk_read_s, LEAST_OF_DISK),
    ]
    if peer is None:
        report.goals.append(
            Goal.unmeasured(f"{name}: beside llama.cpp", ">= 1", "its server is not built")
        )
    else:
        report.goals.append(
            Goal.at_least(f"{name}: llama.cpp's over ours", peer.restored / times.disk, 1.0)
        )


if __name__ == "__main__":
    raise SystemExit(main())
