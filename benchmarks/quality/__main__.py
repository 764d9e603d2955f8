"""``python -m benchmarks.quality [--quick]``: what each quantization costs, in bits per byte.

Every contender is the same checkpoint on the same held-out text: in bfloat16, rounded while
loading, and written by ``coppice quantize`` with each method after calibration on training
text. Loss is the rise of bits per byte over bfloat16, sources weighed alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.quality.score import bits_per_byte, windows
from benchmarks.quality.text import calibration, held_out
from benchmarks.report import Goal, Report
from coppice.models.load import load_model
from coppice.models.locate import locate
from coppice.models.quantized.convert import Sampling, quantize_folder
from coppice.models.quantized.layer import METHODS, Method
from coppice.models.tokenizer import Tokenizer
from coppice.weights.names import scheme
from recipes.bundled.corpus import DEFAULT_DATA

BOUNDS = {"kv int8": 0.1, "int8-weight-only": 0.05, "int8": 0.3, "int4 gptq": 2.5}
"""Most per cent a contender may lose."""


@dataclass(frozen=True)
class Contender:
    """One way to run a checkpoint; calibrated when there is a method."""

    name: str
    quantization: str | None = None
    method: Method | None = None
    kv: Literal["auto", "int8"] = "auto"


def contenders(groups: list[int], methods: list[Method]) -> Iterator[Contender]:
    """Bfloat16 first: the others are compared with it."""
    yield Contender("bf16")
    yield Contender("kv int8", kv="int8")
    others = [f"int4-g{group}" for group in groups]
    for name in ("int8-weight-only", "int8", "int4-weight-only", "int4", *others):
        yield Contender(name, name)
    for method in methods:
        yield Contender(f"int4 {method}", "int4", method)
        for group in groups:
            name = f"int4-g{group}"
            yield Contender(f"{name} {method}", name, method)


def main() -> int:
    """Score every model; non-zero when a goal is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text")
    parser.add_argument("--models", nargs="*", default=["bundled"], help="names or folders")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the texts")
    parser.add_argument("--windows", type=int, default=None, help="windows of 512 tokens a source")
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="other 4-bit groups")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--only", nargs="*", default=[], help="contenders, by name")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 calibration tokens")
    args = parser.parse_args()
    columns = ["model", "contender", "MB of weights", "bits per byte", "loss %", "made in s"]
    whole = args.models == parser.get_default("models") and not args.only
    slug = "-".join([*(Path(name).name.lower() for name in args.models), *(args.only or ())])
    report = Report("quality" if whole else f"quality-{slug.replace(' ', '-')}", columns)
    most = args.windows or (8 if args.quick else 64)
    report.metrics["windows"] = most
    for model in args.models:
        _compare(report, model, most, args)
    return report.finish()


def _compare(report: Report, model: str, most: int, args: argparse.Namespace) -> None:
    folder = locate(model)
    model = Path(model).name  # a result says nothing of where the folder lay
    tokenizer = Tokenizer.from_folder(folder)
    sources = {name: windows(tokenizer, texts, most) for name, texts in held_out(args.data).items()}
    text = calibration(args.data)
    found: dict[str, dict[str, float]] = {}
    for contender in contenders(args.groups, args.methods):
        if args.only and contender.name not in ("bf16", *args.only):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            begin = time.perf_counter()
            path = folder
            if contender.method is not None and contender.quantization is not None:
                path = quantize_folder(
                    folder,
                    Path(scratch) / "model",
                    scheme(contender.quantization),
                    method=contender.method,
                    text=text,
                    sampling=Sampling(sequences=args.sequences),
                )
            loaded = load_model(
                path, dtype="bfloat16", quantization=contender.quantization, max_context=1024
            )
            made_s = time.perf_counter() - begin
        scores = {
            name: bits_per_byte(loaded.decoder, tokenizer, pieces, contender.kv)
            for name, pieces in sources.items()
        }
        scores["mean"] = statistics.mean(scores.values())
        base = found.setdefault("bf16", scores)["mean"]
        loss = 100 * (scores["mean"] / base - 1)
        found[contender.name] = scores | {"loss_percent": loss, "bytes": loaded.weight_bytes}
        print(f"{model}: {contender.name} {loss:+.3f}%", file=sys.stderr, flush=True)
        report.rows.append(
            [
                model,
                contender.name,
                f"{loaded.weight_bytes / 1e6:.1f}",
                f"{scores['mean']:.4f}",
                f"{loss:+.3f}",
                f"{made_s:.1f}",
            ]
        )
        if contender.name in BOUNDS:
            goal = f"{model}, {contender.name}: loss in per cent"
            report.goals.append(Goal.at_most(goal, loss, BOUNDS[contender.name]))
    report.metrics[model] = found


if __name__ == "__main__":
    raise SystemExit(main())
