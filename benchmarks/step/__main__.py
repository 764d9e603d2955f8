"""Split decode steps into native calls, the model's Python and the engine's Python.

    python -m benchmarks.step --batch 1 8 64

Two passes over the same requests: one untouched, which gives the step time and the rate, and
one with a clock around every part, which gives the shares (a clock costs about 0.2 us a call,
so the parts add up to a little more than the step).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.kernels.sampling import native_module

OWN_PYTHON = "step, rest"


class Clock:
    """Exclusive seconds by part: a part's time does not count for the part around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as ``part``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inner.pop()
                self.calls[part] += 1
                self._inner[-1] += took

        return timed


@contextmanager
def clocked(engine: Engine, clock: Clock) -> Iterator[None]:
    """Put ``clock`` around the parts of a step."""
    runner, native = engine._runner, native_module()
    places: list[tuple[Any, str, str]] = [
        (engine, "step", OWN_PYTHON),
        (engine._planner, "plan", "plan"),
        (engine, "_snapshot", "plan"),
        (runner, "lay_out", "run"),
        (runner, "take", "run"),
        (runner._layout, "add", "layout"),
        (runner._layout, "rows", "layout"),
        (runner._layout, "clear", "layout"),
        (runner._pages, "seal", "pages"),
        (runner._pages, "grow", "pages"),
        (runner, "_greedy", "model, Python"),
        (runner._model, "forward", "model, Python"),
        (native.Program, "run", "native program"),
        (native.Program, "run_greedy", "native program"),
        (runner, "_choose", "sampler, Python"),
        (engine, "_accept", "accept and report"),
    ]
    places += [
        (native, name, f"native {name}")
        for name in ("linear", "norm", "gate", "rope", "attention", "gather", "sample")
    ]
    before = []
    for owner, name, part in places:
        found = getattr(owner, name)
        own = name in vars(owner)
        before.append((owner, name, found, own))
        setattr(owner, name, clock.around(part, found))
    try:
        yield
    finally:
        for owner, name, found, own in before:
            if own:
                setattr(owner, name, found)
            else:
                delattr(owner, name)


@dataclass(frozen=True)
class Work:
    """What is decoded: tokens cached when it begins, steps, and how tokens are chosen."""

    context: int
    steps: int
    temperature: float


def decode(model: EngineModel, batch: int, work: Work, clock: Clock | None = None) -> float:
    """Median seconds of a step that decodes ``batch`` sequences, after a warm-up."""
    steps, context = work.steps, work.context
    engine = Engine(model, EngineConfig(max_sequences=max(batch, 16)))
    length = min(engine.context_length, context + steps + 8)
    for i in range(batch):
        prompt = [(17 * i + 7 * j) % 4000 + 5 for j in range(context)]
        params = SamplingParams(
            max_tokens=length - context, temperature=work.temperature, ignore_eos=True, seed=i
        )
        engine.submit(Request(id=str(i), prompt=prompt, sampling=params))
    while engine._waiting or any(s.num_tokens == context for s in engine._running):
        engine.step()
    if clock is not None:
        with clocked(engine, clock):
            return _median_step(engine, steps)
    return _median_step(engine, steps)


def _median_step(engine: Engine, steps: int) -> float:
    took = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> int:
    """Measure and print one table a batch size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=64, help="tokens cached when it begins")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--quantization", default="none", help="round the weights, e.g. int8")
    args = parser.parse_args()
    config = EngineConfig(model=args.model, dtype=args.dtype, quantization=args.quantization)
    model = load_engine_model(config)
    work = Work(args.context, args.steps, args.temperature)
    console = Console(width=100)
    for batch in args.batch:
        plain = [decode(model, batch, work) for _ in range(3)]
        median = statistics.median(plain)
        clock = Clock()
        decode(model, batch, work, clock)
        table = Table("part", "us a step", "calls a step", title=f"batch {batch}")
        for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
            calls = clock.calls[part] / args.steps
            table.add_row(part, f"{seconds / args.steps * 1e6:.1f}", f"{calls:.1f}")
        native = sum(s for p, s in clock.seconds.items() if p.startswith("native"))
        python = sum(clock.seconds.values()) - native
        table.add_row("all native calls", f"{native / args.steps * 1e6:.1f}", "")
        table.add_row("all Python", f"{python / args.steps * 1e6:.1f}", "")
        console.print(table)
        console.print(
            f"step {median * 1e6:.0f} us (rounds {', '.join(f'{p * 1e6:.0f}' for p in plain)}), "
            f"{batch / median:.0f} tokens/s"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
