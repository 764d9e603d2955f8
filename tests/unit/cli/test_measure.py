"""Timing of requests, against an engine whose steps are scripted."""

from __future__ import annotations

import pytest

from coppice.cli.measure import Shape, Spread, draw_shapes, measure
from coppice.engine.messages import Output
from coppice.engine.request import Request
from coppice.errors import EngineError


class OneTokenPerStep:
    """Gives each live request one token per step."""

    def __init__(self, fail: bool = False) -> None:
        self.live: dict[str, int] = {}
        self.requests: list[Request] = []
        self.most_in_flight = 0
        self.fail = fail

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def submit(self, request: Request) -> None:
        self.live[request.id] = request.sampling.max_tokens or 0
        self.requests.append(request)
        self.most_in_flight = max(self.most_in_flight, len(self.live))

    def step(self) -> list[Output]:
        outputs = []
        for name in list(self.live):
            self.live[name] -= 1
            ended = self.live[name] == 0
            reason = ("failed" if self.fail else "length") if ended else None
            outputs.append(Output(request_id=name, tokens=[1], finish_reason=reason))
            if ended:
                del self.live[name]
        return outputs


def test_counts_every_token_and_keeps_the_concurrency() -> None:
    engine = OneTokenPerStep()
    shapes = [Shape(3, n) for n in (2, 5, 4, 3)]
    ended = []
    timings = measure(
        engine, shapes, concurrency=2, vocab_size=10, seed=1, on_end=lambda: ended.append(1)
    )
    assert [t.num_tokens for t in timings] == [2, 5, 4, 3]
    assert engine.most_in_flight == 2
    assert len(ended) == 4
    assert all(t.sent <= t.first < t.last for t in timings)
    assert all(len(r.prompt) == 3 and max(r.prompt) < 10 for r in engine.requests)
    assert all(r.sampling.ignore_eos for r in engine.requests)


def test_a_failed_request_voids_the_measurement() -> None:
    with pytest.raises(EngineError):
        measure(OneTokenPerStep(fail=True), [Shape(1, 2)], concurrency=1, vocab_size=4, seed=0)


def test_same_seed_same_shapes_within_the_context() -> None:
    def shapes(seed: int) -> list[Shape]:
        return draw_shapes(200, prompt_tokens=100, answer_tokens=50, context_length=256, seed=seed)

    assert shapes(1) == shapes(1) != shapes(2)
    assert all(s.prompt_tokens + s.answer_tokens <= 256 for s in shapes(1))
    assert min(s.prompt_tokens for s in shapes(1)) >= 1


def test_spread_orders_its_figures() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.low, spread.median, spread.high, spread.p99) == (2.0, 3.0, 4.0, 5.0)
