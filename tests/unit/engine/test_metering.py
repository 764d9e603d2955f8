"""Usage by tenant and key: exact counts, shares of step time that add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.loop import EngineLoop
from coppice.engine.messages import Shutdown, StepStats
from coppice.engine.request import Request, SamplingParams
from coppice.scheduling import StepPlanner
from tests.kits.invariance import RandomPreemption
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, page_size=16, prefill_chunk=32)
MARK = 201


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def request(i: int, prompt: int = 50, answer: int = 20) -> Request:
    params = SamplingParams(max_tokens=answer, ignore_eos=True, seed=i, temperature=0.0)
    tokens = [1 + (7 * i + j) % 200 for j in range(prompt)]
    return Request(id=f"r{i}", prompt=tokens, sampling=params, tenant=f"t{i % 3}", key=f"k{i % 2}")


def finish(engine: Engine, count: int) -> float:
    """Run so many requests to their ends; the seconds of the steps that had rows."""
    for i in range(count):
        engine.submit(request(i))
    before, busy = engine.stats(), 0.0
    while engine.has_work:
        engine.step()
        after = engine.stats()
        if after.rows > before.rows:
            busy += seconds(after) - seconds(before)
        before = after
    return busy


def seconds(stats: StepStats) -> float:
    return stats.model_s + stats.draft_s + stats.other_s


@pytest.mark.parametrize("preempted", [False, True])
def test_counts_are_exact_and_seconds_add_up(model: EngineModel, preempted: bool) -> None:
    planner = RandomPreemption(StepPlanner(), 3) if preempted else StepPlanner()
    engine = Engine(model, replace(CONFIG, prefix_cache=False), planner=planner)
    busy = finish(engine, 12)
    usage = engine.meter.usage
    assert [(u.tenant, u.key) for u in usage] == sorted(
        (f"t{i % 3}", f"k{i % 2}") for i in range(6)
    )
    for used in usage:
        assert (used.sequences, used.prompt_tokens, used.generated_tokens) == (2, 100, 40)
        # All but the last token of an answer are computed once; the rest is recomputation.
        assert used.computed_tokens - used.recomputed_tokens == 2 * (50 + 20 - 1)
        assert used.cached_tokens == used.drafted_tokens == 0
        assert used.page_s > 0
    assert (sum(u.recomputed_tokens for u in usage) > 0) == preempted
    assert sum(u.computed_tokens for u in usage) == engine.stats().rows
    assert sum(u.step_s for u in usage) == pytest.approx(busy)


def test_a_fault_of_the_model_leaves_no_step_of_its_neighbours_out(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forward", "greedy"):
        real: Callable[..., Any] = getattr(model.decoder, name)

        def broken(rows: Any, *args: Any, real: Callable[..., Any] = real) -> Any:
            if (rows.token == MARK).any():
                raise RuntimeError
            return real(rows, *args)

        monkeypatch.setattr(model.decoder, name, broken)
    engine = Engine(model, replace(CONFIG, prefix_cache=False))
    engine.submit(Request(id="bad", prompt=[5] * 40 + [MARK], sampling=request(0).sampling))
    finish(engine, 3)
    found = {u.tenant: u.computed_tokens for u in engine.meter.usage if u.tenant != "default"}
    assert found == dict.fromkeys(("t0", "t1", "t2"), 50 + 20 - 1)


def test_equal_work_costs_equal_shares(model: EngineModel) -> None:
    ticks = count()  # every step is as long as any other
    engine = Engine(model, replace(CONFIG, prefix_cache=False), clock=lambda: float(next(ticks)))
    finish(engine, 60)
    by_tenant = [
        sum(u.step_s for u in engine.meter.usage if u.tenant == t) for t in ("t0", "t1", "t2")
    ]
    assert max(by_tenant) / min(by_tenant) < 1.1


def test_cached_and_guessed_tokens_are_told(model: EngineModel) -> None:
    engine = Engine(model, replace(CONFIG, speculate="lookup"))
    for i in range(2):
        engine.submit(
            Request(id=f"x{i}", prompt=[5, 6, 7, 8] * 16, sampling=request(0, 4, 40).sampling)
        )
        while engine.has_work:
            engine.step()
    (used,) = engine.meter.usage
    assert used.cached_tokens > 0
    assert used.drafted_tokens == engine.speculated["drafted"]
    assert used.accepted_tokens == engine.speculated["accepted"]


def test_usage_is_appended_as_json_lines(model: EngineModel, tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    engine = Engine(model, replace(CONFIG, usage_file=str(path)))
    finish(engine, 2)
    loop = EngineLoop(engine, lambda messages: None)
    loop.inbox.put(Shutdown())
    loop.run()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["tenant"] for line in lines] == ["t0", "t1"]
    assert lines[0]["generated_tokens"] == 20


def test_a_file_that_cannot_be_written_stops_nobody(
    model: EngineModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(model, replace(CONFIG, usage_file=str(tmp_path / "no" / "where")))
    loop = EngineLoop(engine, lambda messages: None)
    loop.inbox.put(Shutdown())
    loop.run()
    assert "usage was not written" in capfd.readouterr().err


def test_wishes_for_time_are_counted_once_each_as_met_or_missed(model: EngineModel) -> None:
    now = [0.0]
    engine = Engine(model, CONFIG, clock=lambda: now[0])

    def ask(i: int, **wishes: Any) -> None:
        engine.submit(msgspec.structs.replace(request(i, answer=4), tenant="t", key="k", **wishes))

    def run(seconds_a_step: float) -> tuple[int, int]:
        while engine.has_work:
            engine.step()
            now[0] += seconds_a_step
        [used] = engine.meter.usage
        return used.deadlines_met, used.deadlines_missed

    ask(0)
    assert run(1.0) == (0, 0), "no wish, nothing to meet"
    ask(1, ttft_s=50.0, tpot_s=2.0, deadline_s=100.0)
    ask(2, tpot_s=0.5)
    ask(3, ttft_s=0.5)
    ask(4, deadline_s=1.5)
    assert run(1.0) == (1, 3)
    ask(5, deadline_s=100.0)
    engine.cancel("r5")
    assert run(1.0) == (1, 3), "who went away has missed nothing"
    ask(5, deadline_s=1.5, wants_deadline=False)
    assert run(1.0) == (1, 3), "the server's own bound is nobody's wish"


def test_a_clock_that_jumps_ends_what_is_due_and_harms_nothing_else(model: EngineModel) -> None:
    now = [1000.0]
    engine = Engine(model, replace(CONFIG, policy="isolated"), clock=lambda: now[0])
    for i in range(6):
        wish = 60.0 if i % 2 else None
        engine.submit(msgspec.structs.replace(request(i), deadline_s=wish, tpot_s=wish))
    ended: dict[str, str] = {}
    for step in count():
        now[0] += {3: -900.0, 8: 86_400.0}.get(step, 0.01)
        for output in engine.step():
            if output.finish_reason is not None:
                ended[output.request_id] = output.finish_reason
        if not engine.has_work:
            break
    assert ended == {f"r{i}": "expired" if i % 2 else "length" for i in range(6)}
    engine.check_pages()
    assert engine.stats().pages_used == 0
