"""A request cut short at any token and given to a fresh engine goes on bit for bit alike."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.messages import Progress
from coppice.engine.request import Grammar, Request
from tests.kits.invariance import make_requests, run
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, max_sequences=16)


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def requests_of(model: EngineModel) -> list[Request]:
    """The kit's, some of them constrained, some with a minimum and stop tokens."""
    made = make_requests(model, 40, 3)
    for i in range(0, len(made), 4):
        grammar = Grammar("regex", "(red|green|blue, ){2,9}")
        sampling = msgspec.structs.replace(made[i].sampling, grammar=grammar)
        made[i] = msgspec.structs.replace(made[i], sampling=sampling)
    for i in range(1, len(made), 4):
        sampling = msgspec.structs.replace(
            made[i].sampling, min_tokens=4, stop_token_ids=tuple(range(40, 60))
        )
        made[i] = msgspec.structs.replace(made[i], sampling=sampling)
    return made


@pytest.mark.parametrize("speculate", ["off", "auto"])
def test_same_tokens_and_logprobs_from_any_cut(model: EngineModel, speculate: str) -> None:
    config = replace(CONFIG, speculate=speculate, draft_model=SMALL)
    requests = requests_of(model)
    expected = run(Engine(model, config), requests)
    rng = random.Random(5)
    engine, cuts = Engine(model, config), {}
    for request in requests:
        tokens = expected[request.id][0]
        cuts[request.id] = cut = rng.randrange(len(tokens))
        engine.submit(request, [Progress(0, list(tokens[:cut]), 7, 3)])
    found: dict[str, tuple[list[int], list[object], str | None]] = {
        request.id: ([], [], None) for request in requests
    }
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs, _ = found[output.request_id]
            tokens += output.tokens
            logprobs += output.logprobs or ()
            found[output.request_id] = tokens, logprobs, output.finish_reason
            assert output.drafted >= 7 and output.accepted >= 3
    for request in requests:
        tokens, logprobs, reason = found[request.id]
        cut = cuts[request.id]
        wanted = expected[request.id]
        assert tuple(tokens) == wanted[0][cut:], request.id
        assert [(x.token, x.logprob, tuple(x.top)) for x in logprobs] == list(wanted[1][cut:])
        assert reason == wanted[2]
    engine.check_pages()


def test_only_open_choices_go_on(model: EngineModel) -> None:
    sampling = msgspec.structs.replace(
        make_requests(model, 1, 1)[0].sampling, n=4, seed=9, max_tokens=20, ignore_eos=True
    )
    request = Request(id="x", prompt=list(range(5, 60)), sampling=sampling)

    def answers(engine: Engine) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.index, []).extend(output.tokens)
        return found

    whole = Engine(model, CONFIG)
    whole.submit(request)
    expected = answers(whole)
    engine = Engine(model, CONFIG)
    engine.submit(request, [Progress(1, expected[1][:19]), Progress(3)])
    assert answers(engine) == {1: expected[1][19:], 3: expected[3]}
    assert engine.outcomes == {"finished": 1}
