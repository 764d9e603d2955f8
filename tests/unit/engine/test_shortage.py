"""Short of memory: cached prefixes go, newcomers are told so, what runs goes on unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coppice.cache.pool import KVPool
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.loop import EngineLoop
from coppice.engine.messages import FromEngine, Output, Shutdown, StepStats, Submit
from coppice.engine.request import Request, SamplingParams
from coppice.engine.shortage import Shortage, room_mib
from coppice.errors import CapacityError
from coppice.models.kv import KVLayout
from coppice.server import ServerConfig
from coppice.server.admission import Admission, Load
from tests.kits.models import SMALL

CONFIG = EngineConfig(model=SMALL, page_size=16, prefill_chunk=32)
MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def ask(name: str) -> Submit:
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, temperature=0.7)
    return Submit(Request(id=name, prompt=[3 + j % 200 for j in range(90)], sampling=params))


def run(model: EngineModel, rooms: dict[str, float]) -> tuple[dict[str, list[int]], list[Any]]:
    """One request after another, each with so much room; tokens, and the figures at each end."""
    engine, left, room = Engine(model, CONFIG), list(rooms), [0.0]
    tokens: dict[str, list[int]] = {name: [] for name in rooms}
    ends: list[StepStats] = []

    def begin() -> None:
        if not left:
            loop.inbox.put(Shutdown())
            return
        room[0] = rooms[left[0]]
        loop.inbox.put(ask(left.pop(0)))

    def send(messages: Sequence[FromEngine]) -> None:
        for message in messages:
            if isinstance(message, Output):
                tokens[message.request_id] += message.tokens
        if any(isinstance(m, Output) and m.finish_reason for m in messages):
            ends.extend(m for m in messages if isinstance(m, StepStats))
            begin()

    clock = count()
    loop = EngineLoop(engine, send, Shortage(100, lambda: room[0], lambda: float(next(clock))))
    begin()
    loop.run()
    engine.pages.check(iter(()))
    return tokens, ends


def test_prefixes_go_and_requests_run_on_with_the_same_tokens(model: EngineModel) -> None:
    tokens, ends = run(model, {"much": 1e3, "again": 1e3, "tight": 150, "short": 50, "back": 1e3})
    assert len({tuple(found) for found in tokens.values()}) == 1
    assert [end.short_of_memory for end in ends] == [False, False, False, True, False]
    hits = [end.prefix_hit_tokens for end in ends]
    assert hits[1] > hits[0], "with room the second finds the first one's prefix"
    assert hits[3] == hits[2] == hits[1], "kept prefixes were let go of"


def test_levels_rise_at_once_and_fall_when_there_is_room_again() -> None:
    room, now = [1000.0], [0.0]
    shortage = Shortage(100, lambda: room[0], lambda: now[0])

    def at(left: float) -> str:
        room[0], now[0] = left, now[0] + 1.0
        assert shortage.look() is (shortage.level != "none")
        assert not shortage.look(), "once a while is enough"
        return shortage.level

    seen = [at(left) for left in (300, 199, 99, 150, 199, 201, 150)]
    assert seen == ["none", "tight", "short", "short", "short", "none", "tight"]
    now[0] += 1.0
    assert not Shortage(0, lambda: -1.0, lambda: now[0]).look()


def test_room_is_that_of_the_tightest_group_and_files_count_as_left(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {700 * 1024} kB\n")
    assert room_mib(proc, groups) == 700
    (proc / "self/cgroup").write_text("0::/pod/box\n")
    box = groups / "pod/box"
    box.mkdir(parents=True)
    (box / "memory.max").write_text("max\n")
    assert room_mib(proc, groups) == 700
    for folder, limit in ((box, 900), (box.parent, 800)):
        (folder / "memory.max").write_text(f"{limit * MIB}\n")
        (folder / "memory.current").write_text(f"{500 * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\nfile {200 * MIB}\nshmem {50 * MIB}\n")
    assert room_mib(proc, groups) == 800 - 500 + 150
    assert room_mib(tmp_path / "none", groups / "none") == float("inf")


def test_free_pages_give_their_memory_back_and_their_neighbours_keep_theirs() -> None:
    layout = KVLayout(
        num_layers=2, num_kv_heads=4, head_dim=64, page_size=32,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    pool = KVPool(layout, 12)
    for page in range(12):
        pool.write_page(page, torch.full((layout.page_bytes,), page + 1, dtype=torch.uint8).numpy())
    pool.give_back([2, 3, 4, 5, 9])
    for page in (0, 1, 6, 7, 8, 10, 11):
        assert (pool.read_page(page) == page + 1).all()
    assert not pool.read_page(4).any(), "a page between free ones is whole pages of the system's"


def test_newcomers_are_refused_while_memory_is_short() -> None:
    stats = SimpleNamespace(prefill_rate_tok_s=1000.0, short_of_memory=True)
    engine: Any = SimpleNamespace(live={}, stats=stats, facts=None)
    admission = Admission(ServerConfig(), engine)
    with pytest.raises(CapacityError) as refused:
        admission.admit("somebody", Load(sequences=1, prompt_tokens=5))
    assert refused.value.code == "short_of_memory" and refused.value.retry_after_s
    with pytest.raises(CapacityError):
        admission.require_place("somebody")
    stats.short_of_memory = False
    admission.admit("somebody", Load(sequences=1, prompt_tokens=5))
