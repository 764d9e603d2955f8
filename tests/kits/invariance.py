"""The invariance kit: same request, same tokens and log-probabilities, bit for bit.

`outcomes` runs requests through an engine under an `Arrangement` of everything that must not
matter (neighbours, chunking, cached prefixes, preemption). Features that touch the step add
a field here and nothing else.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import msgspec

from coppice.engine.config import EngineConfig, LaneChoice
from coppice.engine.engine import Engine
from coppice.engine.lanes import TwoLanes
from coppice.engine.loading import EngineModel
from coppice.engine.request import Request, SamplingParams
from coppice.engine.speculate import make_speculator
from coppice.scheduling import Plan, Planner, Snapshot, StepPlanner
from coppice.scheduling.policy import OrderName, PolicyName
from tests.kits.models import SMALL
from tests.kits.proposers import FreeRows, gossiper

Outcome = tuple[tuple[int, ...], tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...], str]

QUESTIONS = Path(__file__).parents[3] / "shared/data/spec_bench/question.jsonl"


@dataclass(frozen=True)
class Arrangement:
    """What surrounds a request and must not change its answer."""

    batched: bool = False
    chunk: int = 512
    cached: bool = False
    preempt: bool = False
    speculate: str = "off"
    """A setting of the engine, or ``"gossip"``: trees of truth and lies."""
    policy: PolicyName = "fcfs"
    order: OrderName = "arrival"
    lanes: LaneChoice = "one"
    tier: str = ""
    """``ram`` or ``disk``, where the pool has room for little; ``restart`` too, with another
    engine to find what the first left on disk."""

    def __str__(self) -> str:
        return "-".join(
            (
                "batched" if self.batched else "alone",
                f"chunk{self.chunk}",
                "cached" if self.cached else "cold",
                "preempted" if self.preempt else "calm",
                self.speculate,
                *(() if self.policy == "fcfs" else (self.policy,)),
                *(() if self.order == "arrival" else (self.order,)),
                *(() if self.lanes == "one" else (f"{self.lanes}-lanes",)),
                *((self.tier,) if self.tier else ()),
            )
        )


ARRANGEMENTS = [
    Arrangement(batched, chunk, cached, preempt)
    for batched, chunk, cached, preempt in itertools.product(
        (False, True), (512, 7, 64), (False, True), (False, True)
    )
]
SPECULATED = [
    Arrangement(batched, 64, cached, preempt, speculate)
    for speculate, (batched, cached, preempt) in itertools.product(
        ("gossip", "auto", "suffix"),
        ((False, False, False), (True, True, False), (True, False, True)),
    )
]


ITSELF = [
    Arrangement(False, 64, speculate="self"),
    Arrangement(True, 64, True, False, "self"),
    Arrangement(True, 7, True, True, "self"),
    Arrangement(True, 64, True, True, "self", tier="restart"),
]
"""For weights the model can draft with itself."""

SCHEDULED = [
    Arrangement(True, 64, i % 2 == 0 or order == "sessions", True, "off", policy, order)
    for i, (policy, order) in enumerate(
        itertools.product(get_args(PolicyName), get_args(OrderName))
    )
    if (policy, order) != ("fcfs", "arrival")
]
"""Every policy with every order, among neighbours of several tenants, under preemption."""

LANED = [
    *(
        Arrangement(True, chunk, cached, preempt, lanes="two")
        for chunk, cached, preempt in itertools.product((512, 7, 64), (False, True), (False, True))
    ),
    *(
        Arrangement(True, 64, True, True, name, lanes="two")
        for name in ("gossip", "auto", "suffix")
    ),
    *(Arrangement(True, 64, True, True, policy=name, lanes="two") for name in get_args(PolicyName)),
    Arrangement(True, 64, True, True, order="sessions", lanes="two"),
    Arrangement(True, 64, True, True, lanes="two", tier="ram-disk"),
]
"""Prompts beside decodes; where nothing decodes there is nothing to fly beside."""

TIERED = [
    Arrangement(batched, 64, True, preempt, speculate, tier=tier)
    for tier, (batched, preempt, speculate) in itertools.product(
        ("ram", "disk", "ram-disk", "restart"),
        ((False, False, "off"), (True, True, "off"), (True, True, "suffix")),
    )
]


class RandomPreemption:
    """A planner that throws out random running sequences, whatever the need."""

    def __init__(self, inner: Planner, seed: int, rate: float = 0.15) -> None:
        self._inner = inner
        self._random = random.Random(seed)
        self._rate = rate
        self.count = 0

    def plan(self, snapshot: Snapshot) -> Plan:
        """The inner plan, less the victims' grants."""
        plan = self._inner.plan(snapshot)
        leaving = set(map(id, plan.preempt))
        victims = [
            s
            for s in snapshot.running
            if id(s) not in leaving and self._random.random() < self._rate
        ]
        self.count += len(victims)
        gone = set(map(id, victims))
        return replace(
            plan,
            preempt=[*plan.preempt, *victims],
            grants=[g for g in plan.grants if id(g.sequence) not in gone],
        )


def make_requests(model: EngineModel, count: int, seed: int) -> list[Request]:
    """Real questions cut to 1-200 tokens, every third greedy, others sampled every way."""
    rng = random.Random(seed)
    lines = QUESTIONS.read_text().splitlines()
    texts = [turn for line in lines for turn in json.loads(line)["turns"]]
    requests = []
    for i in range(count):
        tokens = model.tokenizer.encode(rng.choice(texts))[: rng.choice((1, 31, 32, 33, 80, 200))]
        params = SamplingParams(
            max_tokens=rng.randint(4, 24),
            temperature=0.0 if i % 3 == 0 else rng.choice((0.5, 1.0, 1.4)),
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 40)),
            min_p=rng.choice((0.0, 0.05)),
            presence_penalty=rng.choice((0.0, 0.5)),
            repetition_penalty=rng.choice((1.0, 1.2)),
            logprobs=3,
            seed=rng.getrandbits(40),
        )
        requests.append(Request(id=f"r{i}", prompt=tokens, sampling=params))
    return requests


def outcomes(
    model: EngineModel,
    config: EngineConfig,
    requests: list[Request],
    arrangement: Arrangement,
    seed: int = 0,
    answers: Sequence[Sequence[int]] = (),
    folder: Path | None = None,
) -> dict[str, Outcome]:
    """Run ``requests`` under ``arrangement``; what came of each, by id.

    Args:
        answers: prompt and answer tokens for ``speculate="gossip"``.
        folder: for pages on disk.
    """
    gossip = arrangement.speculate == "gossip"
    config = replace(
        config,
        prefill_chunk=arrangement.chunk,
        prefix_cache=arrangement.cached,
        max_sequences=32,
        speculate="off" if gossip else arrangement.speculate,
        draft_model=SMALL,
        policy=arrangement.policy,
        order=arrangement.order,
        tenant_limit=10_000,
        lanes=arrangement.lanes,
    )
    if arrangement.tier:
        config = replace(
            config,
            kv_cache_mib=1,
            kv_ram_mib=64 if "ram" in arrangement.tier else 0,
            kv_disk_dir=None if arrangement.tier == "ram" else str(folder),
        )
    if arrangement.order == "sessions":  # whose pages are kept, and taken all the same
        config = replace(config, kv_cache_mib=1)
    requests = [_dressed(request, i) for i, request in enumerate(requests)]
    if gossip:
        speculator = gossiper(answers, seed, model.facts.vocab_size)
    else:  # how much is guessed must not depend on how busy the machine is
        speculator = make_speculator(config, model, FreeRows(), num_pages=1024, on_trial=False)
    planner: Planner = StepPlanner()
    if arrangement.preempt:
        planner = RandomPreemption(planner, seed)
    engine = Engine(model, config, planner=planner, speculator=speculator)
    if arrangement.cached:
        for request in requests:
            warm = msgspec.structs.replace(request, id=f"warm-{request.id}")
            run(engine, [warm])
    if arrangement.tier == "restart":
        engine.close()
        engine = Engine(model, config, planner=planner, speculator=speculator)
    if not arrangement.batched:
        found = {}
        for request in requests:
            found |= run(engine, [request])
    else:
        found = _run_among_neighbours(engine, model, requests, seed)
    engine.check_pages()
    if arrangement.lanes != "one":
        assert isinstance(engine.lanes, TwoLanes)
        assert engine.lanes.num_beside > 0, "nothing flew: the arrangement tested nothing"
        engine.lanes.close()
    if arrangement.tier:
        assert engine.pages.tiers is not None
        hits = engine.pages.tiers.hits
        engine.close()
        assert sum(hits.values()) > 0, "no page came back: the arrangement tested nothing"
        assert arrangement.tier != "restart" or hits["disk"] > 0
    if arrangement.order == "sessions":
        assert engine.sessions.num_paused > 0, "nothing was paused: the arrangement tested nothing"
        assert engine.pages.pins.num_revoked > 0, "nothing kept was taken: it tested little"
    if isinstance(planner, RandomPreemption):
        assert planner.count > 0, "nothing was preempted: the arrangement tested nothing"
    if arrangement.speculate != "off":
        assert engine.speculated["accepted"] > 0, "nothing was accepted: it tested nothing"
        assert engine.speculated["faults"] == 0
    if arrangement.cached:
        assert engine.pages.hit_tokens > 0, "nothing was cached: the arrangement tested nothing"
    return found


def _dressed(request: Request, i: int) -> Request:
    """The request with a tenant, a session, a priority and wishes; none may change its answer."""
    return msgspec.structs.replace(
        request,
        tenant=f"t{i % 3}",
        session=("", f"a{i % 10}", f"b{i}")[i % 3],
        session_tool=("", "look", "test")[i % 3],
        priority=i % 2,
        ttft_s=(None, 0.001, 10.0)[i % 3],
        tpot_s=(None, 0.0001, 10.0)[i % 3],
    )


def run(engine: Engine, requests: list[Request]) -> dict[str, Outcome]:
    """Submit all at once and step to the end."""
    for request in requests:
        engine.submit(request)
    return _collect(engine, {r.id for r in requests})


def _run_among_neighbours(
    engine: Engine, model: EngineModel, requests: list[Request], seed: int
) -> dict[str, Outcome]:
    rng = random.Random(seed)
    others = make_requests(model, len(requests) // 2, seed + 1)
    crowd = [
        *requests,
        *(msgspec.structs.replace(r, id=f"n{r.id}", session=f"n{r.id}") for r in others),
    ]
    rng.shuffle(crowd)
    for request in crowd:
        engine.submit(request)
    return _collect(engine, {r.id for r in requests})


def _collect(engine: Engine, wanted: set[str]) -> dict[str, Outcome]:
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[tuple[int, float, tuple[tuple[int, float], ...]]]] = {}
    found: dict[str, Outcome] = {}
    while engine.has_work or engine.sessions.outside:
        if not engine.has_work:  # no tool comes back here: those outside may come in
            for session in engine.sessions.victims(engine.clock()):
                engine.sessions.end(session, engine.clock())
        for output in engine.step():
            key = output.request_id
            tokens.setdefault(key, []).extend(output.tokens)
            logprobs.setdefault(key, []).extend(
                (lp.token, lp.logprob, tuple((t, p) for t, p in lp.top))
                for lp in output.logprobs or ()
            )
            if output.finish_reason is not None and key in wanted:
                found[key] = (tuple(tokens[key]), tuple(logprobs[key]), output.finish_reason)
    assert found.keys() == wanted
    return found
