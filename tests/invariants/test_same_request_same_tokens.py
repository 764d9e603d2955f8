"""Promise 1: a request's output does not depend on what surrounds it, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.kernels import native_available, set_num_threads
from tests.kits.invariance import (
    ARRANGEMENTS,
    ITSELF,
    LANED,
    SCHEDULED,
    SPECULATED,
    TIERED,
    Arrangement,
    Outcome,
    make_requests,
    outcomes,
)
from tests.kits.models import SMALL

NUM_REQUESTS = 100


CONFIGS = {
    "float32": EngineConfig(model=SMALL, dtype="float32"),
    "bfloat16": EngineConfig(model=SMALL, dtype="bfloat16"),
    "kv-int8": EngineConfig(model=SMALL, kv_cache_dtype="int8"),
    "int8": EngineConfig(model=SMALL, quantization="int8"),
    "int4": EngineConfig(model=SMALL, quantization="int4"),
    "int4-weight-only": EngineConfig(model=SMALL, quantization="int4-weight-only"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def model(config: EngineConfig) -> EngineModel:
    return load_engine_model(config)


@pytest.fixture(scope="module")
def expected(model: EngineModel, config: EngineConfig) -> dict[str, Outcome]:
    return outcomes(model, config, make_requests(model, NUM_REQUESTS, 1), Arrangement())


@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS[1:], *SPECULATED], ids=str)
def test_same_tokens_and_logprobs(
    model: EngineModel,
    config: EngineConfig,
    expected: dict[str, Outcome],
    arrangement: Arrangement,
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    answers = [[*r.prompt, *expected[r.id][0]] for r in requests]
    found = outcomes(model, config, requests, arrangement, seed=5, answers=answers)
    wrong = [key for key in expected if found[key] != expected[key]]
    assert not wrong, f"{len(wrong)} of {NUM_REQUESTS} differ, first {wrong[0]}"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, marks=() if c in ("float32", "kv-int8") else pytest.mark.slow)
        for c in CONFIGS
    ],
    indirect=True,
)
@pytest.mark.parametrize("arrangement", TIERED, ids=str)
def test_same_from_every_tier(
    model: EngineModel,
    config: EngineConfig,
    expected: dict[str, Outcome],
    arrangement: Arrangement,
    tmp_path: Path,
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    assert outcomes(model, config, requests, arrangement, seed=5, folder=tmp_path) == expected


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c == "float32" else pytest.mark.slow) for c in CONFIGS],
    indirect=True,
)
@pytest.mark.parametrize("arrangement", SCHEDULED, ids=str)
def test_same_under_every_policy(
    model: EngineModel,
    config: EngineConfig,
    expected: dict[str, Outcome],
    arrangement: Arrangement,
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    assert outcomes(model, config, requests, arrangement, seed=5) == expected


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lanes of one thread each, and of as many as their work asks for."""
    set_num_threads(request.param)
    yield
    set_num_threads()


@pytest.mark.skipif(not native_available(), reason="the extension is not built")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c == "float32" else pytest.mark.slow) for c in CONFIGS],
    indirect=True,
)
@pytest.mark.parametrize("arrangement", LANED, ids=str)
def test_same_in_two_lanes(
    model: EngineModel,
    config: EngineConfig,
    expected: dict[str, Outcome],
    arrangement: Arrangement,
    tmp_path: Path,
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    answers = [[*r.prompt, *expected[r.id][0]] for r in requests]
    found = outcomes(model, config, requests, arrangement, 5, answers, tmp_path)
    assert found == expected


@pytest.mark.skipif(not native_available(), reason="the extension is not built")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("config", ["int4-weight-only"], indirect=True)
def test_same_in_two_lanes_when_it_drafts_for_itself(
    model: EngineModel, config: EngineConfig, expected: dict[str, Outcome]
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    arrangement = Arrangement(True, 7, True, True, "self", lanes="two")
    assert outcomes(model, config, requests, arrangement, seed=5) == expected


@pytest.mark.parametrize("config", ["int4-weight-only"], indirect=True)
@pytest.mark.parametrize("arrangement", ITSELF, ids=str)
def test_same_when_it_drafts_for_itself(
    model: EngineModel,
    config: EngineConfig,
    expected: dict[str, Outcome],
    arrangement: Arrangement,
    tmp_path: Path,
) -> None:
    requests = make_requests(model, NUM_REQUESTS, 1)
    assert outcomes(model, config, requests, arrangement, seed=5, folder=tmp_path) == expected


def test_the_kit_notices_a_difference(
    model: EngineModel, config: EngineConfig, expected: dict[str, Outcome]
) -> None:
    """Another seed must change sampled answers, or the comparison above proves nothing."""
    import msgspec

    requests = [
        msgspec.structs.replace(r, sampling=msgspec.structs.replace(r.sampling, seed=12345))
        for r in make_requests(model, 12, 1)
    ]
    found = outcomes(model, config, requests, Arrangement())
    assert any(found[key] != expected[key] for key in found)
