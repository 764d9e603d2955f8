"""Timing requests on an engine in this process: first token, per token, throughput."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coppice.engine.request import Request, SamplingParams
from coppice.errors import EngineError

if TYPE_CHECKING:
    from coppice.engine.messages import Output


class Steps(Protocol):
    """The part of `Engine` that is measured."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    def submit(self, request: Request) -> None:
        """Accept a request."""
        ...

    def step(self) -> list[Output]:
        """Run one step."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of one request, in tokens."""

    prompt_tokens: int
    answer_tokens: int


@dataclass(slots=True)
class Timing:
    """When one request was sent, got its first token and ended, in seconds."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.last - self.first) / max(1, self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a measurement."""

    median: float
    low: float
    high: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles of at least one value."""
        ordered = sorted(values)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(statistics.median(ordered), at(0.25), at(0.75), at(0.99))


def measure(
    engine: Steps,
    shapes: Sequence[Shape],
    *,
    concurrency: int,
    vocab_size: int,
    seed: int,
    on_end: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Send requests so that ``concurrency`` are in flight until all have ended.

    Prompts are random token ids, so that no prefix is shared, and answers run to their
    full length.

    Returns:
        One timing per shape, in order.

    Raises:
        EngineError: a request failed; a figure without it would be wrong.
    """
    draw = random.Random(seed)
    timings: dict[str, Timing] = {}
    waiting = list(enumerate(shapes))[::-1]
    in_flight = 0
    while waiting or in_flight:
        while waiting and in_flight < concurrency:
            number, shape = waiting.pop()
            request = _request(f"bench-{seed}-{number}", shape, draw, vocab_size)
            timings[request.id] = Timing(time.perf_counter())
            engine.submit(request)
            in_flight += 1
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            timing = timings[output.request_id]
            if output.tokens and not timing.num_tokens:
                timing.first = now
            timing.num_tokens += len(output.tokens)
            if output.finish_reason is not None:
                if output.finish_reason != "length":
                    raise EngineError(f"A request of the benchmark ended: {output.error}.")
                timing.last = now
                in_flight -= 1
                on_end()
    return list(timings.values())


def _request(name: str, shape: Shape, draw: random.Random, vocab_size: int) -> Request:
    prompt = [draw.randrange(vocab_size) for _ in range(shape.prompt_tokens)]
    sampling = SamplingParams(
        max_tokens=shape.answer_tokens, temperature=0.0, ignore_eos=True, seed=0
    )
    return Request(id=name, prompt=prompt, sampling=sampling)


def draw_shapes(
    count: int, *, prompt_tokens: int, answer_tokens: int, context_length: int, seed: int
) -> list[Shape]:
    """Lengths with the long tail of real traffic: log-normal around the given medians."""
    draw = random.Random(seed)
    shapes = []
    for _ in range(count):
        answer = round(answer_tokens * draw.lognormvariate(0, 0.5))
        prompt = round(prompt_tokens * draw.lognormvariate(0, 0.7))
        answer = min(max(1, answer), context_length // 2)
        shapes.append(Shape(min(max(1, prompt), context_length - answer), answer))
    return shapes
