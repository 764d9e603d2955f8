"""``python -m benchmarks.phases [--quick]``: prefill and decode side by side, and long prompts.

In the simulator: Qwen2.5-3B on devices of 16, 92 and 108 units, three requests in ten of the
lengths of arXiv papers and their abstracts, the others of Azure's chats, arriving at random at
0.7 and 1.25 times the rate whose arithmetic keeps the device busy. One lane runs chunked prefill,
first come first served, in steps of 64 to 2,048 rows; two lanes are Nexus's. On this
machine, with random weights in the shape of Qwen2.5-0.5B at int8: the longest time between two
tokens of an answer while a prompt of 4,000 tokens runs; and what a mixed load costs in one lane,
in two, and as ``--lanes auto`` chooses.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy

from benchmarks.phases.lanes import compare
from benchmarks.report import Goal, Report
from benchmarks.workloads.azure import DATA, text_tokens
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.scheduling.flows import InOrder
from coppice.scheduling.interfaces import Plan, RequestOrder, Snapshot
from coppice.scheduling.lanes import ModelWork, VirtualLanes
from coppice.scheduling.orders import ByArrival, ShortestPrompt
from coppice.scheduling.partition import Device, automatic
from coppice.scheduling.planner import StepPlanner
from coppice.scheduling.policy import Policy
from coppice.scheduling.traces import read_trace
from coppice.scheduling.virtual import Sizes, VirtualEngine, VirtualSequence
from tools.make_model import make_model

WORK = ModelWork(
    flops_per_row=2 * 3.09e9, weight_bytes=6.2e9, flops_per_key=4 * 2048 * 36, kv_bytes=36_864
)
"""Qwen2.5-3B in bfloat16."""
PAGE_SIZE = 32
KV_BYTES = 30e9
DEVICES = {
    "16 cores": Device(units=16, flops_per_s=8e12, bytes_per_s=2e11, launch_s=1e-3),
    "L20": Device(units=92, flops_per_s=84e12, bytes_per_s=7.3e11, launch_s=2e-3),
    "A100": Device(units=108, flops_per_s=218e12, bytes_per_s=1.7e12, launch_s=2e-3),
}
"""Seven tenths of what is printed on the box in arithmetic, 85% in bandwidth."""
LOADS = {"light": 0.7, "heavy": 1.25}
BUDGETS = (64, 128, 256, 512, 1024, 2048)
"""Rows of a step of one lane: more are sooner with first tokens and later with the others."""
MOST_ROWS = BUDGETS[-1]
PATIENCE = 500.0
"""A prompt is overtaken by shorter ones for so many times its reading at most."""
LONG = 4000


@dataclass(frozen=True)
class Found:
    """Means in seconds; ``long_s`` is the 95th percentile of the longest tenth of prompts."""

    ttft_s: float
    tbt_s: float
    late_tbt_s: float
    long_s: float
    seconds: float


def main() -> int:
    """Every device and load with one lane and with two; then this machine."""
    parser = argparse.ArgumentParser(prog="benchmarks.phases", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    args = parser.parse_args()
    count = 600 if args.quick else 1500
    report = Report(
        "phases",
        ["device", "load", "lanes", "mean TTFT s", "mean TBT ms", "p95 TBT ms", "long s", "tok/s"],
    )
    equal, least, tbt, long, alone = {}, {}, {}, {}, {}
    for name, device in DEVICES.items():
        capacity = 1 / statistics.mean(map(partial(seconds_of, device), requests(1.0, count)))
        for load, share in LOADS.items():
            key, rate = f"{name}, {load}", share * capacity
            run = partial(simulate, device, order=ByArrival())
            one = {rows: run(requests(rate, count), rows) for rows in BUDGETS}
            order = _shortest(device)
            two = simulate(device, requests(rate, count), MOST_ROWS, order=order, lanes=True)
            same = simulate(device, requests(rate, count), MOST_ROWS, order=order)
            labels = {f"one, {rows} rows": found for rows, found in one.items()}
            for label, f in (labels | {"two": two, "one, in their order": same}).items():
                report.rows.append(
                    [name, load, label, f"{f.ttft_s:.2f}", f"{f.tbt_s * 1e3:.1f}",
                     f"{f.late_tbt_s * 1e3:.1f}", f"{f.long_s:.1f}", ""]
                )  # fmt: skip
            quickest = min(one.values(), key=lambda f: f.ttft_s)
            equal[key] = ttft_at(list(one.values()), two.tbt_s) / two.ttft_s
            least[key] = quickest.ttft_s / two.ttft_s
            tbt[key] = two.tbt_s / quickest.tbt_s
            long[key] = two.long_s / quickest.long_s
            alone[key] = same.ttft_s / two.ttft_s
    report.metrics |= {
        "equal_tbt_ratio": equal,
        "quickest_ratio": least,
        "tbt_ratio": tbt,
        "long_ratio": long,
        "same_order_ratio": alone,
    }
    heavy = [key for key in equal if key.endswith("heavy")]
    report.goals += [
        Goal.at_least("mean TTFT of one lane over two at equal mean TBT, heavy, least",
                      min(equal[k] for k in heavy), 2),
        Goal.at_least("the same where one lane's is best, whatever its TBT, heavy, least",
                      min(least[k] for k in heavy), 2),
        Goal.at_most("its mean TBT over that one's, most", max(tbt[k] for k in heavy), 1.0),
        Goal.at_most("p95 TTFT of the longest tenth, over one lane", max(long.values()), 1.5),
    ]  # fmt: skip
    _on_this_machine(report, rounds=1 if args.quick else 3)
    return report.finish()


def requests(rate: float, count: int, seed: int = 1) -> list[VirtualSequence]:
    """Papers and chats, mixed."""
    rng = random.Random(seed)
    with gzip.open(DATA / "vidur_profiles" / "arxiv_summarization_lengths.csv.gz", "rt") as file:
        papers = [
            (int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
            for row in csv.DictReader(file)
        ]
    chats = [(a.prompt, a.answer) for a in read_trace(DATA / "azure_llm_2023" / "conv.csv.gz")]
    now, made = 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        prompt, answer = rng.choice(papers if rng.random() < 0.3 else chats)
        made.append(
            VirtualSequence(
                arrival=i, num_prompt=prompt, num_answer=max(2, answer), submitted_s=now
            )
        )
    return made


def seconds_of(device: Device, sequence: VirtualSequence) -> float:
    """Arithmetic of a request on all units: what a device that is busy must do for it."""
    batch = [(sequence, sequence.num_prompt)]
    answer = sequence.num_answer * WORK.flops_per_row
    return (sum(o.flops for o in WORK.of(batch)) + answer) / device.flops_per_s


def ttft_at(budgets: list[Found], tbt_s: float) -> float:
    """Mean TTFT of one lane at a mean TBT, between the two row budgets on either side of it."""
    found = sorted((f.tbt_s, f.ttft_s) for f in budgets)
    times, firsts = zip(*found, strict=True)
    return float(numpy.interp(tbt_s, times, firsts))


def simulate(
    device: Device,
    sequences: list[VirtualSequence],
    rows: int,
    *,
    order: RequestOrder,
    lanes: bool = False,
) -> Found:
    """One run. A prompt may fill a step of its own lane; beside decodes it gets 512 rows."""
    last: dict[int, float] = {}
    gaps: list[float] = []

    def told(sequence: VirtualSequence, now: float) -> None:
        if sequence.arrival in last:
            gaps.append(now - last[sequence.arrival])
        last[sequence.arrival] = now

    sizes = Sizes(
        num_pages=int(KV_BYTES / WORK.kv_bytes / PAGE_SIZE), page_size=PAGE_SIZE, max_rows=rows,
        prefill_chunk=rows if lanes else min(rows, 512), max_sequences=256, prefix_cache=False,
    )  # fmt: skip
    engine = VirtualEngine(
        lambda rows, keys, sequences: 0.0, sizes, Policy(InOrder(), order),
        planner=StepPlanner(), on_token=told,
    )  # fmt: skip
    VirtualLanes(engine, device, WORK, automatic(device) if lanes else None).play(sequences)
    longest = sorted(sequences, key=lambda s: s.num_prompt)[-len(sequences) // 10 :]
    return Found(
        statistics.mean(s.first_token_s - s.submitted_s for s in sequences),
        statistics.mean(gaps),
        statistics.quantiles(gaps, n=20)[-1],
        statistics.quantiles([s.first_token_s - s.submitted_s for s in longest], n=20)[-1],
        engine.now,
    )


def _shortest(device: Device) -> ShortestPrompt:
    row_s = WORK.flops_per_row / device.flops_per_s
    return ShortestPrompt(lambda: row_s, PATIENCE)


def _on_this_machine(report: Report, *, rounds: int) -> None:
    """The engine's one lane: gaps between tokens beside a long prompt, whole and in chunks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model("qwen2.5-0.5b", folder)
        config = EngineConfig(
            model=str(folder), quantization="int8", context_length=2 * LONG, keep_packed=False
        )
        model = load_engine_model(config)
    whole = replace(config, max_rows=LONG + 64, prefill_chunk=LONG)
    gaps: dict[str, list[float]] = {"whole": [], "in chunks": []}
    for _ in range(rounds):
        for name, settings in (("whole", whole), ("in chunks", config)):
            gaps[name].append(_worst_gap(model, settings))
    worst = {name: statistics.median(found) for name, found in gaps.items()}
    for name, seconds in worst.items():
        report.rows.append(
            ["this machine", f"a prompt of {LONG}", f"one, {name}", "", "",
             f"worst {seconds * 1e3:.0f}", "", ""]
        )  # fmt: skip
    report.metrics["worst_gap_s"] = worst
    report.goals.append(
        Goal.at_most("worst gap beside a long prompt, in chunks over whole",
                     worst["in chunks"] / worst["whole"], 0.3)
    )  # fmt: skip
    compare(report, model, replace(config, prefix_cache=False), rounds=3 if rounds == 1 else 5)


class Whole(StepPlanner):
    """Steps as large as the settings allow, however long they take."""

    def plan(self, snapshot: Snapshot) -> Plan:
        """See `Planner`."""
        return super().plan(replace(snapshot, max_rows=LONG + 64))


def _worst_gap(model: EngineModel, config: EngineConfig) -> float:
    """Longest wait between two tokens of a short request, a long one arriving meanwhile."""
    engine = Engine(model, config, planner=Whole() if config.prefill_chunk >= LONG else None)
    vocab = model.facts.vocab_size
    params = SamplingParams(max_tokens=600, temperature=0.0, ignore_eos=True)
    engine.submit(Request(id="short", prompt=text_tokens(32, vocab, 1), sampling=params))
    for _ in range(20):
        engine.step()
    params = SamplingParams(max_tokens=1, temperature=0.0)
    engine.submit(Request(id="long", prompt=text_tokens(LONG, vocab, 2), sampling=params))
    worst, last, ended = 0.0, time.perf_counter(), False
    while not ended:
        outputs = engine.step()
        if any(output.request_id == "short" for output in outputs):
            now = time.perf_counter()
            worst, last = max(worst, now - last), now
        ended = any(output.request_id == "long" for output in outputs)
    engine.close()
    return worst


if __name__ == "__main__":
    sys.exit(main())
