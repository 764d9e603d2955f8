"""The goals of whole models, from medians. Pure: a figure that is missing misses its goal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.decode.contest import COPPICE, PEERS, Case, Figure
from benchmarks.decode.shape import Shape, roofline_s
from benchmarks.peers.protocol import VERIFY_ROWS
from benchmarks.probe import Limits
from benchmarks.report import Goal

DECODE_OVER_PEER = {"bf16": 0.95, "int8": 1.2, "int4": 1.5}
VERIFY_OVER_ROOFLINE = {"bf16": 1.3, "int8": 1.4, "int4": 1.4}
BANDWIDTH_SHARE, DECODE8_OVER_PEER, VERIFY16_OVER_PEER = 0.85, 2.0, 2.5
PREFILL_INT8_SHARE, PREFILL_INT8_OVER_PEER, PREFILL_BF16_SHARE = 0.6, 1.15, 0.85
BUNDLED_INT8_TOK_S, STEP_OVERHEAD_US = 3000.0, 100.0
CONTEXT, PREFILL = 512, 512
NO_INT8_PROBE = "the kernels have no probe of the int8 peak"

Figures = dict[tuple[Case, str, str], Figure]
Facts = dict[tuple[Case, str], dict[str, float]]


def median(figure: Figure | None) -> Any:
    """Over the rounds: a number, or a list by number of rows; ``None`` without values."""
    if figure is None or not figure.values:
        return None
    if isinstance(figure.values[0], list):
        return [statistics.median(column) for column in zip(*figure.values, strict=True)]
    return statistics.median(figure.values)


@dataclass(frozen=True)
class Judge:
    """Looks at one model's figures.

    Attributes:
        figures: of everyone, all rounds.
        facts: what the contenders told of themselves.
        shape: the model's.
    """

    figures: Figures
    facts: Facts
    shape: Shape

    def goals(self, model: str, forms: list[str]) -> Iterator[Goal]:
        """All that apply to the model, met or not."""
        for form in forms:
            case = Case(model, form)
            yield from self._decode(case)
            yield from self._verify(case)
            yield from self._prefill(case)
        yield from self._decode8(model, forms)
        if model == "bundled" and "int8" in forms:
            yield from self._bundled(Case(model, "int8"))

    def ours(self, case: Case, task: str) -> Any:
        """Coppice's median."""
        return median(self.figures.get((case, COPPICE.name, task)))

    def why(self, case: Case, task: str) -> str:
        """Why Coppice has no figure."""
        figure = self.figures.get((case, COPPICE.name, task))
        return f"coppice: {figure.note if figure and figure.note else 'not run'}"

    def best_peer(self, case: Case, task: str) -> tuple[str, float] | None:
        """The peer with the highest rate, and the rate."""
        found = [
            (value, peer.name)
            for peer in PEERS
            if (value := median(self.figures.get((case, peer.name, task)))) is not None
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def roofline_s(self, case: Case, rows: int, limits: Limits) -> float | None:
        """Least seconds for ``rows`` rows over the context, logits for all.

        bf16 weights are multiplied at the float32 rate where nothing faster was seen.
        """
        peak = limits.bf16 if case.form == "bf16" else limits.int8
        facts = self.facts.get((case, COPPICE.name))
        if peak is None or facts is None:
            return None
        size = facts["weight_bytes"] + facts["kv_bytes_per_token"] * CONTEXT
        ops = self.shape.linear_ops(rows, rows) + self.shape.attention_ops(rows, CONTEXT)
        return roofline_s(size, ops, bytes_s=limits.read_bytes_s, ops_s=peak)

    def bandwidth_share(self, case: Case) -> float | None:
        """Weight bytes per second of decoding over the probe, the median of the rounds."""
        figure = self.figures.get((case, COPPICE.name, "decode1"))
        if figure is None or not figure.values:
            return None
        size = self.facts[case, COPPICE.name]["weight_bytes"]
        pairs = zip(figure.values, figure.bandwidths, strict=True)
        return statistics.median(value * size / bandwidth for value, bandwidth in pairs)

    def over_roofline(self, case: Case) -> list[float] | None:
        """Verification time by number of rows, over its roofline."""
        curve, figure = self.ours(case, "verify"), self.figures.get((case, COPPICE.name, "verify"))
        if curve is None or figure is None:
            return None
        limits = figure.typical_limits
        floors = [self.roofline_s(case, rows, limits) for rows in VERIFY_ROWS]
        if any(floor is None for floor in floors):
            return None
        return [t / floor for t, floor in zip(curve, floors, strict=True) if floor]

    def _decode(self, case: Case) -> Iterator[Goal]:
        name = f"{case.model} {case.form} decode b1"
        if case.model != "bundled":  # the bundled weights stay in cache
            share = self.bandwidth_share(case)
            yield _at_least(f"{name}: share of bandwidth", share, BANDWIDTH_SHARE, self, case)
        yield self._over_peer(case, "decode1", f"{name}: over", DECODE_OVER_PEER[case.form])

    def _verify(self, case: Case) -> Iterator[Goal]:
        name, bound = f"{case.model} {case.form} verify", VERIFY_OVER_ROOFLINE[case.form]
        worst = self.over_roofline(case)
        title = f"{name}: worst time over roofline"
        if worst is not None:
            yield Goal.at_most(title, max(worst), bound)
        else:
            measured = self.ours(case, "verify") is not None
            why = NO_INT8_PROBE if measured else self.why(case, "verify")
            yield Goal.unmeasured(title, f"<= {bound:g}", why)
        if case.form != "bf16":
            yield self._verify16(case)

    def _verify16(self, case: Case) -> Goal:
        at = VERIFY_ROWS.index(16)
        curves = {
            peer.name: median(self.figures.get((case, peer.name, "verify"))) for peer in PEERS
        }
        times = {name: curve[at] for name, curve in curves.items() if curve is not None}
        ours = self.ours(case, "verify")
        title = f"{case.model} {case.form} verify 16 rows: over"
        if not times:
            return Goal.unmeasured(f"{title} best peer", f">= {VERIFY16_OVER_PEER:g}", "no peer")
        best = min(times, key=lambda name: times[name])
        ratio = None if ours is None else times[best] / ours[at]
        return _at_least(f"{title} {best}", ratio, VERIFY16_OVER_PEER, self, case)

    def _prefill(self, case: Case) -> Iterator[Goal]:
        ours = self.ours(case, "prefill")
        name = f"{case.model} {case.form} prefill"
        ops = self.shape.linear_ops(PREFILL, 1) + self.shape.attention_ops(PREFILL, 0)
        rate = None if ours is None else ours * ops / PREFILL
        if case.form == "bf16":
            title = f"{name}: share of PyTorch's matmul rate"
            yield self._peak_share(case, rate, title, PREFILL_BF16_SHARE)
        elif case.form == "int8":
            yield self._peak_share(case, rate, f"{name}: share of int8 peak", PREFILL_INT8_SHARE)
            yield self._over_peer(case, "prefill", f"{name}: over", PREFILL_INT8_OVER_PEER)

    def _peak_share(self, case: Case, rate: float | None, title: str, bound: float) -> Goal:
        if rate is None:
            return _at_least(title, None, bound, self, case)
        limits = self.figures[case, COPPICE.name, "prefill"].typical_limits
        peak = limits.matmul if case.form == "bf16" else limits.int8
        if peak is None:
            return Goal.unmeasured(title, f">= {bound:g}", NO_INT8_PROBE)
        return Goal.at_least(title, rate / peak, bound)

    def _decode8(self, model: str, forms: list[str]) -> Iterator[Goal]:
        cases = [Case(model, form) for form in forms]
        ours = [rate for case in cases if (rate := self.ours(case, "decode8")) is not None]
        peers = [found for case in cases if (found := self.best_peer(case, "decode8"))]
        title = f"{model} decode b8, best precision each: over"
        if not ours or not peers:
            why = "no peer" if ours else self.why(cases[0], "decode8")
            yield Goal.unmeasured(f"{title} best peer", f">= {DECODE8_OVER_PEER:g}", why)
            return
        name, rate = max(peers, key=lambda found: found[1])
        yield Goal.at_least(f"{title} {name}", max(ours) / rate, DECODE8_OVER_PEER)

    def _bundled(self, case: Case) -> Iterator[Goal]:
        rate = self.ours(case, "decode1")
        yield _at_least("bundled int8 decode b1, tokens/s", rate, BUNDLED_INT8_TOK_S, self, case)
        title = "bundled int8: µs of a step outside the model"
        if rate is None:
            bound = f"<= {STEP_OVERHEAD_US:g}"
            yield Goal.unmeasured(title, bound, self.why(case, "decode1"))
        else:
            overhead = self.facts[case, COPPICE.name]["outside_model_us"]
            yield Goal.at_most(title, overhead, STEP_OVERHEAD_US)

    def _over_peer(self, case: Case, task: str, title: str, bound: float) -> Goal:
        best = self.best_peer(case, task)
        if best is None:
            return Goal.unmeasured(f"{title} best peer", f">= {bound:g}", "no peer")
        ours = self.ours(case, task)
        ratio = None if ours is None else ours / best[1]
        return _at_least(f"{title} {best[0]}", ratio, bound, self, case)


def _at_least(name: str, value: float | None, bound: float, judge: Judge, case: Case) -> Goal:
    if value is None:
        return Goal.unmeasured(name, f">= {bound:g}", judge.why(case, "decode1"))
    return Goal.at_least(name, value, bound)
