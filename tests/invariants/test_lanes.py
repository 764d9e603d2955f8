"""Two lanes: whatever clients do while prompts are in flight, tokens and pages are as in one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from coppice.engine.config import EngineConfig, LaneChoice
from coppice.engine.engine import Engine
from coppice.engine.lanes import TwoLanes
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.messages import Output
from coppice.engine.request import Grammar, Request, SamplingParams
from coppice.kernels import native_available, set_num_threads
from coppice.scheduling import StepPlanner
from tests.kits.invariance import RandomPreemption
from tests.kits.models import SMALL

pytestmark = pytest.mark.skipif(not native_available(), reason="the extension is not built")

CONFIG = EngineConfig(
    model=SMALL, dtype="float32", page_size=16, prefill_chunk=48, max_rows=96, max_sequences=12
)
POISON = 777
Answer = tuple[tuple[int, ...], tuple[float, ...]]


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    set_num_threads(2)
    yield
    set_num_threads()


def random_request(rng: random.Random, i: int) -> Request:
    prompt = [7] * rng.choice((0, 40, 64)) + [
        rng.randrange(1, 200) for _ in range(rng.randint(1, 150))
    ]
    params = SamplingParams(
        n=rng.choice((1, 1, 2, 3)),
        max_tokens=rng.choice((1, 5, 24, 60)),
        temperature=rng.choice((0.0, 1.0)),
        logprobs=rng.choice((None, 2)),
        grammar=rng.choice((None, None, Grammar(kind="regex", source="[a-z ]{3,30}"))),
        seed=i,
    )
    return Request(id=f"r{i}", prompt=prompt, sampling=params, cache_salt=rng.choice(("", "a")))


class Clients:
    """Sends requests, and gathers what comes back by request and choice."""

    def __init__(self, model: EngineModel, lanes: LaneChoice, planner: Any = None) -> None:
        page_bytes = model.decoder.kv_layout(16).page_bytes
        small = max(1, (60 * page_bytes) >> 20)
        config = replace(CONFIG, lanes=lanes, kv_cache_mib=small)
        self.engine = Engine(model, config, planner=planner)
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.ends: dict[tuple[str, int], str] = {}

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            key = output.request_id, output.index
            assert key not in self.ends, f"{key} ended twice"
            self.tokens.setdefault(key, []).extend(output.tokens)
            self.logprobs.setdefault(key, []).extend(lp.logprob for lp in output.logprobs or ())
            if output.finish_reason is not None:
                self.ends[key] = output.finish_reason

    def run(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.submit(request)
        while self.engine.has_work:
            self.take(self.engine.step())


@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 13))]
)
def test_cancels_parks_and_preemptions_in_flight(model: EngineModel, seed: int) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng, i) for i in range(60)]
    calm = Clients(model, "one")
    calm.run(requests)

    wild = Clients(model, "two", RandomPreemption(StepPlanner(), seed, 0.03))
    engine, coming, parked = wild.engine, list(requests), set[str]()
    ids, disturbed = [r.id for r in requests], 0
    while coming or engine.has_work or parked:
        if coming and rng.random() < 0.5:
            engine.submit(coming.pop())
        wild.take(engine.step())
        aloft = [s.request.id for s in engine._running if engine.lanes.holds(s)]
        some = rng.choice(aloft or ids)
        match rng.randrange(12):
            case 0:
                disturbed += some in aloft
                wild.take(engine.cancel(some, index=rng.choice((None, 0, 1))))
            case 1 | 2:
                disturbed += some in aloft
                engine.park(some, True)
                parked.add(some)
            case 3 | 4 | 5 if parked:
                engine.park(parked.pop(), False)
        engine.check_pages()

    assert disturbed > 0, "nothing was in flight: the test tested nothing"
    assert engine.stats().pages_used == 0
    assert sum(engine.outcomes.values()) == len(requests)
    for key, end in wild.ends.items():
        if end != "cancelled":
            assert (wild.tokens[key], wild.logprobs[key], end) == (
                calm.tokens[key], calm.logprobs[key], calm.ends[key]
            )  # fmt: skip
        else:
            told = wild.tokens[key]
            assert told == calm.tokens[key][: len(told)]
    engine.close()


def test_a_fault_beside_decodes_fails_its_own_request_alone(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    requests = [random_request(rng, i) for i in range(30)]
    calm = Clients(model, "one")
    calm.run(requests)
    bad = Request(id="bad", prompt=[POISON] * 90, sampling=SamplingParams(max_tokens=4))

    faulty = Clients(model, "two")
    assert isinstance(faulty.engine.lanes, TwoLanes)
    prompts: Any = faulty.engine.lanes._prompts
    forward = prompts._model.forward
    failed = 0

    def forward_or_fail(rows: Any, pool: Any) -> Tensor:
        nonlocal failed
        if POISON in rows.token.tolist():
            failed += 1
            raise RuntimeError("broken")
        logits: Tensor = forward(rows, pool)
        return logits

    monkeypatch.setattr(prompts._model, "forward", forward_or_fail)
    monkeypatch.setattr(prompts._model, "greedy", lambda *_: None)
    faulty.run([*requests[:15], bad, *requests[15:]])
    assert failed > 0, "it ran in the other lane: the test tested nothing"
    assert faulty.ends.pop(("bad", 0)) == "failed"
    del faulty.tokens["bad", 0], faulty.logprobs["bad", 0]
    assert (faulty.tokens, faulty.logprobs, faulty.ends) == (calm.tokens, calm.logprobs, calm.ends)
    faulty.engine.check_pages()
    assert faulty.engine.stats().pages_used == 0
    faulty.engine.close()
