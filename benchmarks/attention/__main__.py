"""``python -m benchmarks.attention``: the attention operator beside the machine's limits.

Each case's bound is what the machine could do at best: ``max(bytes / read rate, operations /
multiply rate)``, with the rates probed around it in the same run (`coppice.kernels.probe`).
Bytes are those of the visible keys and values, scales included; operations are two products of
a query head with every visible key, masked ones left out. Calls go round several layers whose
pages do not fit the caches together, as in a model whose weights pass through between two
calls. Each figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.report import Goal, Report
from coppice.cache.pool import KVPool
from coppice.kernels import Probe, get_ops, probe
from coppice.kernels.interface import Ops
from coppice.kernels.rows import Rows
from coppice.models.kv import KVLayout

PAGE = 32
CACHES_BYTES = 64 << 20
"""All layers of a case together take at least this much, or there are `MAX_LAYERS`."""

MAX_LAYERS = 64

PREFILL_GOAL = 0.5
"""Issue: prefill attention at 8k context reaches half of the multiply peak."""


@dataclass(frozen=True)
class Heads:
    """The attention of one model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


HEADS = [
    Heads("bundled", 6, 2, 64),
    Heads("0.5b", 14, 2, 64),
    Heads("1b", 32, 8, 64),
]


@dataclass(frozen=True)
class Case:
    """Rows of one call: ``sequences`` times ``rows`` new tokens over ``context`` cached ones."""

    name: str
    sequences: int
    rows: int
    context: int
    tree: bool = False

    def batch(self) -> Rows:
        """The rows, with pages in a shuffled order."""
        n, s = self.rows, self.sequences
        i32 = torch.int32
        per = -(-(self.context + n) // PAGE)
        table = torch.randperm(s * per, generator=torch.Generator().manual_seed(1))
        # A binary tree, or one row after the other.
        parent = [(i + 1) // 2 - 1 if self.tree else i - 1 for i in range(n)]
        depth: list[int] = []
        for above in parent:
            depth.append(0 if above < 0 else depth[above] + 1)
        start = torch.arange(s).repeat_interleave(n) * n
        parents = torch.tensor(parent).repeat(s)
        return Rows(
            token=torch.zeros(s * n, dtype=i32),
            position=(self.context + torch.tensor(depth).repeat(s)).to(i32),
            sequence=torch.arange(s, dtype=i32).repeat_interleave(n),
            parent=torch.where(parents < 0, -1, parents + start).to(i32),
            slot=(self.context + torch.arange(n).repeat(s)).to(i32),
            adapter=torch.full((s * n,), -1, dtype=i32),
            logit_rows=torch.arange(s * n, dtype=i32),
            page_table=table.view(s, per).to(i32),
            prefix_len=torch.full((s,), self.context, dtype=i32),
        )

    def keys(self) -> tuple[int, int]:
        """Visible keys read from memory, and (row, visible key) pairs."""
        read = self.sequences * (self.context + self.rows)
        own = sum(int(i) for i in self.batch().position.add(1))
        return read, own


CASES = [
    Case("decode 128", 1, 1, 127),
    Case("decode 512", 1, 1, 511),
    Case("decode 2k", 1, 1, 2047),
    Case("decode 8k", 1, 1, 8191),
    Case("8 x decode 512", 8, 1, 511),
    Case("tree of 16 at 512", 1, 16, 512, tree=True),
    Case("tree of 16 at 575", 1, 16, 575, tree=True),
    Case("prefill 512 at 0", 1, 512, 0),
    Case("prefill 512 at 8k", 1, 512, 7680),
]


def fill(ops: Ops, pool: KVPool, heads: Heads, rows: Rows) -> None:
    """Random keys and values for every slot of every sequence, written as the model does."""
    generator = torch.Generator().manual_seed(2)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    no_rotation = torch.zeros(1, 2, 0)
    slots = rows.page_table.shape[1] * PAGE
    for k, v in zip(pool.k, pool.v, strict=True):
        for table in rows.page_table.tolist():
            whole = Rows.chunk([0] * slots, table)
            qkv = torch.randn(slots, width, generator=generator)
            ops.rope_append(qkv, whole, k, v, no_rotation, num_heads=heads.num_heads)


def measure(ops: Ops, case: Case, heads: Heads, dtype: torch.dtype) -> Iterator[float]:
    """Seconds of one call, again and again (about a fifth of a second each)."""
    rows = case.batch()
    pages = rows.page_table.numel()
    one = KVLayout(1, heads.num_kv_heads, heads.head_dim, PAGE, dtype, torch.device("cpu"))
    layers = max(1, min(MAX_LAYERS, -(-CACHES_BYTES // (pages * one.page_bytes))))
    layout = KVLayout(layers, heads.num_kv_heads, heads.head_dim, PAGE, dtype, torch.device("cpu"))
    pool = KVPool(layout, pages)
    fill(ops, pool, heads, rows)
    q = torch.randn(rows.num_rows, heads.num_heads, heads.head_dim)
    scale = heads.head_dim**-0.5

    def run(calls: int) -> float:
        begin = time.perf_counter()
        for call in range(calls):
            at = call % layers
            ops.attention(q, rows, pool.k[at], pool.v[at], scale=scale)
        return (time.perf_counter() - begin) / calls

    calls = max(3, int(0.2 / run(layers)))
    while True:
        yield run(calls)


def bound_s(case: Case, heads: Heads, dtype: torch.dtype, limits: Probe) -> tuple[float, float]:
    """Least seconds for memory and for arithmetic."""
    read, pairs = case.keys()
    one = KVLayout(1, heads.num_kv_heads, heads.head_dim, PAGE, dtype, torch.device("cpu"))
    size = read * one.page_bytes / PAGE
    flops = 4 * pairs * heads.num_heads * heads.head_dim
    return size / limits.read_bytes_s, flops / limits.fma_flop_s


def main() -> int:
    """Measure every case and shape; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.attention", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", nargs="*", default=[h.name for h in HEADS])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--cases", nargs="*", help="only cases whose name begins with one of these")
    args = parser.parse_args()
    ops = get_ops()
    report = Report("attention", ["case, heads, pages", "us", "bound us", "by", "share"])
    chosen = [c for c in CASES if not args.cases or c.name.startswith(tuple(args.cases))]
    for kind in args.dtypes:
        dtype = getattr(torch, kind)
        for heads in (h for h in HEADS if h.name in args.heads):
            for case in chosen:
                timer = measure(ops, case, heads, dtype)
                took, bounds = [], []
                for _ in range(args.rounds):
                    limits = probe(64 << 20)
                    took.append(next(timer))
                    bounds.append(bound_s(case, heads, dtype, limits))
                _add(report, f"{case.name} {heads.name} {kind}", took, bounds)
    return report.finish()


def _add(report: Report, key: str, took: list[float], bounds: list[tuple[float, float]]) -> None:
    """One row of the table."""
    memory, work = (statistics.median(column) for column in zip(*bounds, strict=True))
    us, least = statistics.median(took), max(memory, work)
    by = "read" if memory > work else "multiply"
    report.rows.append([key, f"{us * 1e6:.1f}", f"{least * 1e6:.1f}", by, f"{least / us:.0%}"])
    report.metrics[key] = {"us": us * 1e6, "read_us": memory * 1e6, "multiply_us": work * 1e6}
    if key.startswith("prefill 512 at 8k"):
        report.goals.append(Goal.at_least(f"{key}: share of the bound", least / us, PREFILL_GOAL))


if __name__ == "__main__":
    sys.exit(main())
