"""What a sequence is told about guesses, and that a request may do without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams
from tests.kits.models import SMALL
from tests.kits.proposers import gossiper

CONFIG = EngineConfig(model=SMALL, kv_cache_mib=8)
REQUESTS = [
    Request(id=f"r{i}", prompt=[11, 12, 13 + i], sampling=SamplingParams(max_tokens=24, seed=i))
    for i in range(4)
]


def run(
    requests: Sequence[Request], answers: Sequence[Sequence[int]] = ()
) -> tuple[Engine, list[list[int]], Counter[str]]:
    """The engine afterwards, prompts with answers, and the counts of all last messages."""
    model = load_engine_model(CONFIG)
    speculator = gossiper(answers, 3, model.facts.vocab_size) if answers else None
    engine = Engine(model, CONFIG, speculator=speculator)
    texts = {request.id: list(request.prompt) for request in requests}
    counts: Counter[str] = Counter()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.tokens
            if output.finish_reason is not None:
                counts.update(drafted=output.drafted, accepted=output.accepted)
    return engine, list(texts.values()), counts


def test_last_messages_add_up_to_the_totals() -> None:
    _, answers, _ = run(REQUESTS)
    engine, texts, counts = run(REQUESTS, answers)
    stats = engine.stats()
    assert texts == answers
    assert counts["drafted"] > counts["accepted"] > 0
    assert counts == {"drafted": stats.drafted, "accepted": stats.accepted}


def test_one_request_may_do_without() -> None:
    _, answers, _ = run(REQUESTS)
    without = [msgspec.structs.replace(r, speculate="off") for r in REQUESTS]
    engine, texts, counts = run(without, answers)
    assert counts.total() == engine.stats().drafted == 0
    assert texts == answers
