"""Pages are conserved and outcomes add up, whatever clients do and however little fits."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.errors import ContextOverflowError
from tests.kits.models import SMALL

NUM_REQUESTS = 2000


class Clock:
    """A clock the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def random_request(rng: random.Random, i: int) -> Request:
    shared = [7] * rng.choice((0, 40, 64))
    prompt = shared + [rng.randrange(1, 200) for _ in range(rng.randint(1, 90))]
    params = SamplingParams(
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.choice((1, 5, 24, 100)),
        temperature=rng.choice((0.0, 1.0)),
        seed=i,
        ignore_eos=rng.random() < 0.5,
    )
    deadline = rng.uniform(0.05, 3.0) if rng.random() < 0.2 else None
    return Request(
        id=f"r{i}",
        prompt=prompt,
        sampling=params,
        priority=rng.choice((0, 0, 1)),
        cache_salt=rng.choice(("", "a")),
        deadline_s=deadline,
    )


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_pages_and_outcomes_after_a_randomised_mix(prefix_cache: bool) -> None:
    rng = random.Random(11)
    clock = Clock()
    model = load_engine_model(EngineConfig(model=SMALL, dtype="float32"))
    page_bytes = model.decoder.kv_layout(16).page_bytes
    config = EngineConfig(
        model=SMALL,
        kv_cache_mib=max(1, (28 * page_bytes) >> 20),
        page_size=16,
        max_sequences=12,
        max_rows=96,
        prefill_chunk=48,
        prefix_cache=prefix_cache,
    )
    engine = Engine(model, config, clock=clock)
    live: set[str] = set()
    ended: Counter[str] = Counter()
    open_choices: dict[str, int] = {}
    accepted = 0
    while accepted < NUM_REQUESTS // 2 or engine.has_work:
        clock.now += 0.01
        if accepted < NUM_REQUESTS // 2 and len(live) < 40:
            request = random_request(rng, accepted)
            accepted += 1
            engine.submit(request)
            live.add(request.id)
            open_choices[request.id] = request.sampling.n
        outputs = engine.step()
        if live and rng.random() < 0.08:  # a client leaves: queued, in prefill or mid-answer
            outputs += engine.cancel(rng.choice(sorted(live)))
        for output in outputs:
            if output.finish_reason is not None:
                open_choices[output.request_id] -= 1
                if open_choices[output.request_id] == 0:
                    live.discard(output.request_id)
                    ended["all"] += 1
        if accepted % 50 == 0:
            engine.check_pages()
    engine.check_pages()
    assert not live
    assert ended["all"] == accepted == sum(engine.outcomes.values())
    assert set(engine.outcomes) == {"finished", "cancelled", "expired"}
    stats = engine.stats()
    assert stats.preemptions > 0, "the pool was never short: the test tested nothing"
    assert stats.pages_used == 0
    engine.pages.tree.evict(engine.num_pages)
    assert engine.pages.allocator.num_free == engine.num_pages


def test_a_request_that_cannot_fit_is_refused_with_both_lengths() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))
    engine = Engine(model, EngineConfig(model=SMALL, context_length=64))
    request = Request(id="x", prompt=[1] * 64, sampling=SamplingParams())
    with pytest.raises(ContextOverflowError, match=r"64 tokens.*64"):
        engine.submit(request)
    assert not engine.has_work


def test_cancelled_twice_and_unknown_ids_are_no_error() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))
    engine = Engine(model, EngineConfig(model=SMALL))
    engine.submit(Request(id="x", prompt=[1, 2], sampling=SamplingParams(n=3)))
    first = engine.cancel("x")
    assert [o.finish_reason for o in first] == ["cancelled"] * 3
    assert engine.cancel("x") == engine.cancel("nobody") == []
    assert engine.outcomes == {"cancelled": 1}


def test_n_choices_differ_and_each_repeats_alone_of_its_siblings() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))

    def answers(n: int) -> list[list[int]]:
        engine = Engine(model, EngineConfig(model=SMALL))
        params = SamplingParams(n=n, max_tokens=12, seed=3, ignore_eos=True)
        engine.submit(Request(id="x", prompt=list(range(5, 60)), sampling=params))
        found: list[list[int]] = [[] for _ in range(n)]
        while engine.has_work:
            for output in engine.step():
                found[output.index].extend(output.tokens)
        return found

    four = answers(4)
    assert answers(2) == four[:2]
    assert len({tuple(a) for a in four}) == 4
    assert msgspec.json.encode(four)


def test_a_parked_request_holds_no_page_and_goes_on_with_the_same_tokens() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))

    def answer(park_at: int | None) -> list[int]:
        engine = Engine(model, EngineConfig(model=SMALL))
        params = SamplingParams(max_tokens=40, seed=3, ignore_eos=True)
        engine.submit(Request(id="x", prompt=list(range(5, 60)), sampling=params))
        found: list[int] = []
        while engine.has_work:
            for output in engine.step():
                found.extend(output.tokens)
            if len(found) == park_at:
                engine.park("x", True)
                engine.park("x", True)  # told twice is no harm
                assert not engine.has_work
                assert engine.stats().pages_used == 0
                engine.check_pages()
                engine.park("x", False)
        engine.park("x", True)  # ended long ago
        return found

    assert answer(10) == answer(39) == answer(None)


def test_a_parked_request_can_be_cancelled() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))
    engine = Engine(model, EngineConfig(model=SMALL))
    engine.submit(Request(id="x", prompt=[1, 2], sampling=SamplingParams(max_tokens=9)))
    engine.step()
    engine.park("x", True)
    assert [o.finish_reason for o in engine.cancel("x")] == ["cancelled"]
    assert engine.outcomes == {"cancelled": 1}
    engine.check_pages()
