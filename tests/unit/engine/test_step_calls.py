"""A step's Python is bounded in calls: what it does natively, it does at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.kernels import native_available
from tests.kits.models import SMALL

pytestmark = pytest.mark.skipif(not native_available(), reason="the extension is not built")

OPERATORS = ("linear", "norm", "gate", "rope", "attention", "gather", "sample")


@pytest.fixture
def model() -> EngineModel:
    return load_engine_model(EngineConfig(model=SMALL))


@pytest.fixture
def calls(model: EngineModel, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Native calls by name, counted as they happen."""
    from coppice.kernels import _native

    found: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> Any:
        inner = getattr(owner, name)

        def call(*args: Any) -> Any:
            found[name] += 1
            return inner(*args)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(_native, name, counting(_native, name))
    program: Any = model.decoder.program
    native = program._native

    class Program:
        use_pages = staticmethod(native.use_pages)
        run = staticmethod(counting(native, "run"))
        run_greedy = staticmethod(counting(native, "run_greedy"))

    monkeypatch.setattr(program, "_native", Program)
    return found


def decoding(model: EngineModel, count: int, **params: Any) -> Engine:
    """An engine whose sequences have all read their prompts."""
    engine = Engine(model, EngineConfig(model=SMALL))
    for i in range(count):
        sampling = SamplingParams(max_tokens=40, ignore_eos=True, seed=i, **params)
        engine.submit(Request(id=str(i), prompt=[5 + i, 6, 7], sampling=sampling))
    engine.step()
    return engine


@pytest.mark.parametrize("count", [1, 8])
def test_a_greedy_step_is_one_native_call(
    model: EngineModel, calls: Counter[str], count: int
) -> None:
    engine = decoding(model, count, temperature=0.0)
    calls.clear()
    for _ in range(5):
        assert len(engine.step()) == count
    assert calls == {"run_greedy": 5}


def test_a_sampled_step_is_two(model: EngineModel, calls: Counter[str]) -> None:
    engine = decoding(model, 8, temperature=1.0)
    calls.clear()
    for _ in range(5):
        engine.step()
    assert calls == {"run": 5, "sample": 5}


@pytest.mark.parametrize(
    "params",
    [{"logprobs": 0}, {"logit_bias": {9: 1.0}}, {"presence_penalty": 0.5}, {"temperature": 0.7}],
    ids=lambda p: next(iter(p)),
)
def test_whoever_wants_more_than_the_likeliest_gets_logits(
    model: EngineModel, calls: Counter[str], params: dict[str, Any]
) -> None:
    """One such sequence in the batch is enough, and its neighbours do not notice."""

    def answers(other: dict[str, Any]) -> list[int]:
        engine = Engine(model, EngineConfig(model=SMALL))
        for i, extra in enumerate(({}, other)):
            wanted = {"temperature": 0.0, **extra}
            sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=1, **wanted)
            engine.submit(Request(id=str(i), prompt=[5, 6, 7], sampling=sampling))
        found: list[int] = []
        while engine.has_work:
            found += [t for o in engine.step() if o.request_id == "0" for t in o.tokens]
        return found

    plain = answers({})
    assert calls["run"] == calls["sample"] == 0
    assert calls["run_greedy"] > 0
    calls.clear()
    assert answers(params) == plain
    assert calls["run_greedy"] == 0
    assert calls["sample"] > 0


def test_min_tokens_asks_for_logits_until_it_is_met(
    model: EngineModel, calls: Counter[str]
) -> None:
    engine = Engine(model, EngineConfig(model=SMALL))
    sampling = SamplingParams(max_tokens=10, min_tokens=4, temperature=0.0, ignore_eos=False)
    engine.submit(Request(id="x", prompt=[5, 6, 7], sampling=sampling))
    for _ in range(4):
        engine.step()
    assert calls["sample"] == 4
    if engine.has_work:
        engine.step()
        assert calls["sample"] == 4
        assert calls["run_greedy"] == 1
