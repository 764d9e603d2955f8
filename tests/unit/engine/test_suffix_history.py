"""The engine learns answers for later requests, of those who want it and in their scope only."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.errors import RequestError
from tests.kits.costs import rows_cost_nothing
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, kv_cache_mib=8, speculate="suffix")


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is guessed here must not depend on how busy the machine is."""
    rows_cost_nothing(monkeypatch)


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def ask(engine: Engine, name: str, **fields: object) -> tuple[list[int], int]:
    """The answer and how many of its tokens were guessed."""
    sampling = SamplingParams(max_tokens=48, temperature=1.0, seed=3, ignore_eos=True)
    engine.submit(Request(id=name, prompt=[11, 12, 13], sampling=sampling, **fields))  # type: ignore[arg-type]
    tokens: list[int] = []
    accepted = 0
    while engine.has_work:
        for output in engine.step():
            tokens += output.tokens
            accepted = max(accepted, output.accepted)
    return tokens, accepted


def test_the_second_time_it_knows_the_answer(model: EngineModel) -> None:
    engine = Engine(model, CONFIG)
    first, guessed = ask(engine, "first")
    again, known = ask(engine, "again")
    assert again == first
    assert known > 30 > guessed


def test_other_tenants_salts_and_the_unwilling_teach_nothing(model: EngineModel) -> None:
    engine = Engine(model, CONFIG)
    _, alone = ask(engine, "first", tenant="a")
    assert ask(engine, "second", tenant="b")[1] <= alone
    assert ask(engine, "third", tenant="a", cache_salt="x")[1] <= alone
    assert ask(engine, "fourth", tenant="a")[1] > 30
    silent = Engine(model, CONFIG)
    ask(silent, "first", speculate="off")
    assert ask(silent, "second")[1] <= alone


def test_a_request_may_name_its_proposer(model: EngineModel) -> None:
    engine = Engine(model, CONFIG)
    ask(engine, "first")
    assert ask(engine, "second", speculate="suffix")[1] > 30
    with pytest.raises(RequestError, match="suffix") as refused:
        ask(engine, "third", speculate="draft")
    assert refused.value.param == "speculate"


def test_what_it_learned_outlives_it(model: EngineModel, tmp_path: Path) -> None:
    config = EngineConfig(
        model=SMALL,
        kv_cache_mib=8,
        speculate="suffix",
        keep_history=True,
        cache_dir=str(tmp_path),
    )
    engine = Engine(model, config)
    ask(engine, "first")
    engine.close()
    assert ask(Engine(model, config), "again")[1] > 30
