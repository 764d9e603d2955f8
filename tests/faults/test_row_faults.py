"""What goes wrong in a step ends the rows it belongs to; neighbours are bitwise unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
import torch

from coppice.engine import llm as llm_module
from coppice.engine import step as step_module
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.grammar_state import GrammarState
from coppice.engine.llm import LLM
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Grammar, Request, SamplingParams
from tests.kits import broken_text
from tests.kits.accounts import require_idle_and_whole
from tests.kits.broken_text import BUG, END, PANIC, SCORES, SECRET, UNREADABLE, BrokenAssembler
from tests.kits.invariance import Outcome, make_requests, run
from tests.kits.load import BODIES, CHAT, COMPLETE, STORY, Body, ask
from tests.kits.models import SMALL
from tests.kits.server import ServerProcess

CONFIG = EngineConfig(model=SMALL, max_sequences=16)
GUILTY = 4242  # the seed of requests that something goes wrong over


class PanicError(BaseException):
    """Like what Rust libraries raise: no `Exception`."""


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def load(model: EngineModel, *, greedy: bool = False) -> tuple[list[Request], list[Request]]:
    """Neighbours and guilty ones."""
    made = []
    for i, request in enumerate(make_requests(model, 18, 11)):
        change: dict[str, Any] = {"seed": GUILTY} if i % 6 == 5 else {}
        if greedy:
            change |= {
                "temperature": 0.0, "logprobs": None, "presence_penalty": 0.0,
                "repetition_penalty": 1.0,
            }  # fmt: skip
        if i % 4 == 1:
            change["grammar"] = Grammar("regex", "(red|green|blue, ){2,9}")
        sampling = msgspec.structs.replace(request.sampling, **change)
        made.append(msgspec.structs.replace(request, sampling=sampling))
    guilty = [r for r in made if r.sampling.seed == GUILTY]
    return [r for r in made if r.sampling.seed != GUILTY], guilty


def run_mixed(
    engine: Engine, neighbours: list[Request], guilty: list[Request]
) -> dict[str, Outcome]:
    crowd = [*neighbours, *guilty]
    random.Random(3).shuffle(crowd)
    return run(engine, crowd)


def break_sampler(
    monkeypatch: pytest.MonkeyPatch, model: EngineModel, error: BaseException
) -> None:
    real = step_module.sample

    def sample(logits: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
        if any(s.params.seed == GUILTY and s.num_output >= 2 for s in states):
            raise error
        return real(logits, states, *args, **kwargs)

    monkeypatch.setattr(step_module, "sample", sample)


def break_grammar(
    monkeypatch: pytest.MonkeyPatch, model: EngineModel, error: BaseException
) -> None:
    real = GrammarState.mask
    calls = iter(range(1 << 30))

    def mask(self: GrammarState) -> Any:
        if next(calls) % 7 == 6:
            raise error
        return real(self)

    monkeypatch.setattr(GrammarState, "mask", mask)


def break_model(monkeypatch: pytest.MonkeyPatch, model: EngineModel, error: BaseException) -> None:
    """Raises over the guilty ones' prompts, which hold a token no other does."""
    for name in ("forward", "greedy"):
        real: Callable[..., Any] = getattr(model.decoder, name)

        def broken(rows: Any, *args: Any, real: Callable[..., Any] = real) -> Any:
            if (rows.token == MARK).any():
                raise error
            return real(rows, *args)

        monkeypatch.setattr(model.decoder, name, broken, raising=True)


def damage_logits(monkeypatch: pytest.MonkeyPatch, model: EngineModel, _: BaseException) -> None:
    real: Callable[..., Any] = model.decoder.forward
    monkeypatch.setattr(model.decoder, "greedy", lambda *_: None)

    def forward(rows: Any, pool: Any) -> Any:
        logits = real(rows, pool)
        owners = rows.sequence[rows.token == MARK]
        for place, row in enumerate(rows.logit_rows.tolist()):
            if rows.sequence[row] in owners:
                logits[place, 7] = torch.nan
        return logits

    monkeypatch.setattr(model.decoder, "forward", forward)


MARK = 201
FAULTS = {
    "sampler": (break_sampler, RuntimeError("secret text")),
    "sampler-panic": (break_sampler, PanicError("secret text")),
    "kernel": (break_model, RuntimeError("secret text")),
    "kernel-memory": (break_model, MemoryError()),
    "nan": (damage_logits, RuntimeError()),
}


@pytest.mark.parametrize(
    ("fault", "speculate"),
    [*((name, "off") for name in FAULTS), ("sampler", "auto"), ("kernel", "auto"), ("nan", "auto")],
)
def test_only_the_guilty_fail(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch, fault: str, speculate: str
) -> None:
    neighbours, guilty = load(model, greedy=fault == "kernel" and speculate == "off")
    neighbours = [
        msgspec.structs.replace(r, prompt=[t if t != MARK else 5 for t in r.prompt])
        for r in neighbours
    ]
    guilty = [msgspec.structs.replace(r, prompt=[*r.prompt, MARK]) for r in guilty]
    made = replace(CONFIG, speculate=speculate, draft_model=SMALL)
    expected = run(Engine(model, made), neighbours)
    assert not any(MARK in outcome[0] for outcome in expected.values())
    breaks, error = FAULTS[fault]
    breaks(monkeypatch, model, error)
    engine = Engine(model, made)
    found = run_mixed(engine, neighbours, guilty)
    assert {key: found[key] for key in expected} == expected
    for request in guilty:
        assert found[request.id][2] == "failed" or len(found[request.id][0]) < 3
    assert any(found[r.id][2] == "failed" for r in guilty), "nothing failed: it tested nothing"
    engine.check_pages()
    assert engine.stats().pages_used == 0


def test_a_grammar_that_fails_ends_its_own_row(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours, guilty = load(model)
    requests = [*neighbours, *guilty]
    free = {r.id for r in requests if r.sampling.grammar is None}
    expected = run(Engine(model, CONFIG), requests)
    break_grammar(monkeypatch, model, PanicError("secret text"))
    engine = Engine(model, CONFIG)
    found = run(engine, requests)
    assert {key: found[key] for key in free} == {key: expected[key] for key in free}
    assert {found[r.id][2] for r in requests if r.id not in free} >= {"failed"}
    engine.check_pages()


def test_the_client_is_not_told_what_a_library_said(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_sampler(monkeypatch, model, RuntimeError("secret text"))
    engine = Engine(model, CONFIG)
    engine.submit(load(model)[1][0])
    errors = [o.error for _ in range(60) if engine.has_work for o in engine.step() if o.error]
    assert errors and all(code == "row_fault" and "secret" not in text for code, text in errors)


def test_a_keyboard_interrupt_is_no_row_fault(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_sampler(monkeypatch, model, KeyboardInterrupt())
    engine = Engine(model, CONFIG)
    engine.submit(load(model)[1][0])
    with pytest.raises(KeyboardInterrupt):
        while engine.has_work:
            engine.step()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real engine behind a front end whose tokenizer fails over some requests."""
    settings = {"journal": str(tmp_path_factory.mktemp("journal"))}
    engine = {"kv_cache_mib": 64, "max_sequences": 16}
    with ServerProcess(SMALL, engine=engine, server=settings, program=broken_text.__name__) as made:
        yield made


def doomed(fault: int) -> list[Body]:
    """Requests over which detokenizing raises, on both routes."""
    common = {"seed": fault, "max_tokens": 12, "ignore_eos": True, "n": 2}
    said = [{"role": "user", "content": STORY}]
    return [
        (COMPLETE, {"prompt": STORY, "logprobs": 2, **common}),
        (CHAT, {"messages": said, "logprobs": True, "top_logprobs": 2, **common}),
    ]


def failure(http: httpx.Client, body: Body, how: str) -> tuple[str, int]:
    """Send a request whose answer cannot be made text: the error's code, and events before it."""
    path, fields = body
    if how == "whole":
        reply = http.post(path, json=fields)
        assert reply.status_code == 500 and SECRET not in reply.text
        return reply.json()["error"]["code"], 0
    headers = {"X-Resumable": "true"} if how == "resumable" else {}
    reply = http.post(path, json=fields | {"stream": True}, headers=headers)
    assert reply.headers.get("x-resumable", "false") == headers.get("X-Resumable", "false")
    assert reply.status_code == 200 and SECRET not in reply.text
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return msgspec.json.decode(events[-1])["error"]["code"], len(events) - 1


def test_an_answer_that_cannot_be_made_text_fails_alone(server: ServerProcess) -> None:
    """Whole, streamed and resumable, each beside neighbours who notice nothing."""
    neighbours = [(body, stream) for body in BODIES[2:12] + BODIES[-4:-2] for stream in (0, 1)]
    crowd: list[tuple[Body, str]] = [
        (body, how) for fault in (BUG, PANIC, SCORES, END) for body in doomed(fault)
        for how in ("whole", "stream", "resumable")
    ]  # fmt: skip

    def one(item: Any) -> Any:
        with server.http() as http:
            body, how = item
            return failure(http, body, how) if isinstance(how, str) else ask(http, body, stream=how)

    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(one, neighbours))
    before = require_idle_and_whole(server)["outcomes"]
    mixed = [*neighbours, *crowd]
    random.Random(5).shuffle(mixed)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, mixed))
    for item, wanted in zip(neighbours, expected, strict=True):
        assert found[mixed.index(item)] == wanted, item
    failed = [found[mixed.index(item)] for item in crowd]
    assert {code for code, _ in failed} == {"row_fault"}
    assert any(events > 1 for _, events in failed), "none failed in the middle of its answer"
    after = require_idle_and_whole(server)["outcomes"]
    assert after["failed"] == before["failed"] + len(crowd)
    assert after["finished"] == before["finished"] + len(neighbours)
    assert SECRET in "".join(server.log), "the log says why"


def test_a_text_the_tokenizer_panics_over_fails_alone(server: ServerProcess) -> None:
    before = require_idle_and_whole(server)["outcomes"]
    bodies = (
        ("/tokenize", {"prompt": UNREADABLE}), (COMPLETE, {"prompt": UNREADABLE}),
        ("/tokenize", {"prompt": UNREADABLE * 999}), (COMPLETE, {"prompt": UNREADABLE * 999}),
    )  # fmt: skip
    with server.http() as http:
        for path, body in bodies:
            reply = http.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")
            assert SECRET not in reply.text
        assert http.post(COMPLETE, json={"prompt": "The sea"}).status_code == 200
    assert require_idle_and_whole(server)["outcomes"]["failed"] == before["failed"] + 2


@pytest.mark.parametrize("fault", [BUG, PANIC, END])
def test_without_a_server_it_is_the_prompts_own_answer_that_fails(
    monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    llm = LLM(model=SMALL)
    prompts = [STORY, "The sea", "A ship", "Red"]
    seeds = (1, fault, 3, 4)
    params = [SamplingParams(seed=seed, max_tokens=20, ignore_eos=True) for seed in seeds]
    expected = llm.generate(prompts, params)
    real = llm_module.assembler_for
    monkeypatch.setattr(
        llm_module, "assembler_for",
        lambda tokenizer, params: BrokenAssembler.of(real(tokenizer, params), params.seed),
    )  # fmt: skip
    found = llm.generate(prompts, params)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        mine, wanted = one.outputs[0], other.outputs[0]
        if index == 1:
            assert mine.finish_reason == "failed" and SECRET not in str(mine.stop_reason)
            assert wanted.text.startswith(mine.text)
        else:
            assert (mine.text, mine.token_ids) == (wanted.text, wanted.token_ids)
    assert llm._engine.stats().pages_used == 0
