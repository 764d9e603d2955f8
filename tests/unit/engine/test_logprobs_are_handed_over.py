"""Scores go with the report they belong to: an answer of any length holds none in the engine."""

from __future__ import annotations

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, kv_cache_mib=8)


def test_every_token_has_its_score_and_none_stays() -> None:
    engine = Engine(load_engine_model(CONFIG), CONFIG)
    sampling = SamplingParams(max_tokens=24, seed=1, logprobs=3, n=2)
    engine.submit(Request(id="r", prompt=[11, 12, 13], sampling=sampling))
    seen = 0
    while engine.has_work:
        for output in engine.step():
            scores = output.logprobs or []
            assert [each.token for each in scores] == output.tokens
            assert all(len(each.top) == 3 for each in scores)
            seen += len(scores)
        assert not any(sequence.logprobs for sequence in engine._running)
    assert seen == 48
