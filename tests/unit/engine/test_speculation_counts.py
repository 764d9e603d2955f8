"""What a sequence is told about guesses, and that a request may do without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.speculation import Controller, Speculator
from tests.kits.models import SMALL
from tests.kits.proposers import Gossip, gossiper

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


def test_who_falls_behind_its_wish_is_guessed_for_and_nobody_else() -> None:
    """Where rows cost too much for guesses to pay; steps take a second, 0.8 are wished for."""
    _, answers, _ = run(REQUESTS)
    model = load_engine_model(CONFIG)
    dear = Controller(lambda rows: rows**3.0, max_depth=20)
    speculator = Speculator([Gossip(answers, 3, model.facts.vocab_size)], dear, 4096)
    seconds = [100.0]

    def clock() -> float:
        seconds[0] += 1e-4
        return seconds[0]

    engine = Engine(model, CONFIG, speculator=speculator, clock=clock)
    for request in REQUESTS:
        wish = {"tpot_s": 0.8} if request.id == "r0" else {}
        engine.submit(msgspec.structs.replace(request, **wish))
    texts = {request.id: list(request.prompt) for request in REQUESTS}
    drafted, ended = {}, {}
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.tokens
            if output.finish_reason is not None:
                drafted[output.request_id] = output.drafted
                ended[output.request_id] = seconds[0]
        seconds[0] += 1.0
    assert list(texts.values()) == answers
    assert drafted["r0"] > 0 == sum(drafted[name] for name in ("r1", "r2", "r3"))
    assert ended["r0"] <= 100.0 + 0.8 * 24 + 1.0 < min(ended[name] for name in ("r1", "r2", "r3"))
