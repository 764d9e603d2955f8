"""Whatever happens to KV pages in RAM and on disk, the tokens are the same."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from coppice.cache.files import Files
from coppice.cache.marks import PageKey
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request
from tests.faults.test_engine_killed import kill_engine, wait_ready
from tests.kits.faulty_files import FaultyFiles
from tests.kits.invariance import Outcome, make_requests, run
from tests.kits.load import STORY
from tests.kits.models import SMALL
from tests.kits.server import ServerProcess

SEED = int(os.environ.get("TEST_SEED", "1"))
CONFIG = EngineConfig(model=SMALL, kv_cache_mib=1, max_sequences=8)


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


@pytest.fixture(scope="module")
def requests(model: EngineModel) -> list[Request]:
    """Twelve prompts of four to six pages, more than the pool holds at a time."""
    made = make_requests(model, 12, SEED)
    text = model.tokenizer.encode(STORY * 9)
    return [
        msgspec.structs.replace(request, prompt=[*text[i : i + 130 + 6 * i]])
        for i, request in enumerate(made)
    ]


@pytest.fixture(scope="module")
def expected(model: EngineModel, requests: list[Request]) -> dict[str, Outcome]:
    return run(Engine(model, replace(CONFIG, prefix_cache=False)), requests)


@dataclass
class Bench:
    """Requests, their answers, and a folder for what engines keep on disk."""

    model: EngineModel
    requests: list[Request]
    expected: dict[str, Outcome]
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def engine(self, files: Files | None = None, **more: Any) -> Engine:
        if files is not None:
            self.monkeypatch.setattr("coppice.cache.segments.Files", lambda: files)
        return Engine(self.model, replace(CONFIG, **{"kv_disk_dir": str(self.folder)} | more))

    def once(self, engine: Engine) -> None:
        """Every request, one by one."""
        for request in self.requests:
            assert run(engine, [request])[request.id] == self.expected[request.id]
            engine.check_pages()

    def rounds(self, engine: Engine) -> None:
        """Every request three times, all cached pages thrown out in between."""
        for _ in range(3):
            self.once(engine)
            engine.pages.tree.evict(1 << 20)
            engine.pages.tiers.disk.flush(5.0)  # type: ignore[union-attr]
        engine.close()
        engine.check_pages()


@pytest.fixture
def bench(
    model: EngineModel,
    requests: list[Request],
    expected: dict[str, Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    return Bench(model, requests, expected, tmp_path, monkeypatch)


FATAL: list[dict[str, Any]] = [
    {"room_bytes": 0},
    {"room_bytes": 40},
    {"room_bytes": 300_000},
    *({"fail": {"write": n}} for n in (0, 1, 7)),
    *({"fail": {"read": n}} for n in (0, 1, 5)),
    *({"fail": {"open": n}} for n in (0, 1, 2, 3)),
    {"fail": {"names": 0}},
]


@pytest.mark.parametrize("faults", FATAL, ids=str)
def test_full_disks_and_errors_turn_the_tier_off_and_change_no_token(
    bench: Bench, faults: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles(SEED, **faults)
    with caplog.at_level(logging.WARNING):
        engine = bench.engine(files)
        bench.rounds(engine)
    (tier,) = engine.stats().tiers
    assert files.faults and tier.state == "off"
    assert "space left" in tier.why or "Input/output" in tier.why
    assert len([r for r in caplog.records if "not kept on disk" in r.message]) == 1


def test_rot_is_a_miss(bench: Bench) -> None:
    files = FaultyFiles(SEED, rot=0.02)
    engine = bench.engine(files)
    bench.rounds(engine)
    (tier,) = engine.stats().tiers
    assert files.faults and tier.state == "on"
    assert tier.damaged > 0 and tier.hits > 0 and tier.misses > 0


@pytest.mark.parametrize("how", ["cut", "flip", "delete", "empty", "noise"])
def test_files_damaged_between_starts_are_misses(bench: Bench, how: str) -> None:
    bench.rounds(bench.engine())
    paths = list((bench.folder / "coppice-kv").glob("*.kv"))
    assert paths
    rng = random.Random(SEED)
    for path in paths:
        size = path.stat().st_size
        if how == "cut":
            os.truncate(path, rng.randrange(size // 4, size - 1))
        elif how == "delete":
            path.unlink()
        elif how == "empty":
            os.truncate(path, 0)
        elif how == "noise":
            path.write_bytes(rng.randbytes(size))
        else:
            content = bytearray(path.read_bytes())
            for _ in range(200):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
    engine = bench.engine()
    bench.rounds(engine)
    (tier,) = engine.stats().tiers
    assert tier.state == "on" and tier.written > 0


def test_a_folder_that_cannot_be_made_is_a_warning(bench: Bench) -> None:
    (bench.folder / "file").write_text("")
    engine = bench.engine(kv_disk_dir=str(bench.folder / "file" / "kv"))
    bench.rounds(engine)
    assert engine.stats().tiers[0].state == "off"


def test_of_two_servers_with_one_folder_the_second_waits_its_turn(bench: Bench) -> None:
    first = bench.engine()
    second = bench.engine()
    bench.once(second)
    assert "another server" in second.stats().tiers[0].why
    bench.rounds(first)
    assert first.stats().tiers[0].hits > 0
    deadline = time.monotonic() + 10
    while second.stats().tiers[0].state == "off":  # until it is its turn
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.rounds(second)
    assert second.stats().tiers[0].hits > 0


class HungFiles(Files):
    """A disk that at some time brings nothing any more."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()

    def read(self, file: int, buffers: Sequence[Any], at: int) -> int:
        self.answers.wait(60.0)
        return super().read(file, buffers, at)


def test_a_disk_that_hangs_holds_nobody_up(bench: Bench) -> None:
    files = HungFiles()
    engine = bench.engine(files)
    disk = engine.pages.tiers.disk  # type: ignore[union-attr]
    asked, other = bench.requests[:2]
    run(engine, [asked])
    engine.pages.tree.evict(1 << 20)
    assert disk is not None and disk.flush(5.0)
    waited_s, reading = [0.0], disk.reading

    def timed(key: PageKey, wait_s: float) -> bool:
        began = time.monotonic()
        coming = reading(key, wait_s)
        waited_s[0] += time.monotonic() - began
        return coming

    bench.monkeypatch.setattr(disk, "reading", timed)
    files.answers.clear()
    try:
        engine.submit(other)
        engine.step()
        engine.submit(asked)
        tokens: dict[str, list[int]] = {asked.id: [], other.id: []}
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id] += output.tokens
        assert tuple(tokens[asked.id]) == bench.expected[asked.id][0]
        assert 0.0 < waited_s[0] < 1.0
        assert engine.stats().tiers[0].hits == 0
    finally:
        files.answers.set()


def test_pages_of_one_tenant_are_never_found_by_another(bench: Bench) -> None:
    def scoped(tenant: str) -> list[Request]:
        return [msgspec.structs.replace(r, cache_salt=f"{tenant}\n") for r in bench.requests]

    engine = bench.engine(kv_ram_mib=16)
    for request in scoped("alice"):
        run(engine, [request])
    engine.close()
    engine = bench.engine(kv_ram_mib=16)  # alice's pages are on disk now
    for tenant, finds in (("bob", False), ("alice", True)):
        request = scoped(tenant)[-1]
        assert run(engine, [request])[request.id] == bench.expected[request.id]
        assert (sum(t.hits for t in engine.stats().tiers) > 0) == finds
    engine.close()


BODY = {"prompt": STORY * 12, "max_tokens": 24, "seed": 5}


def answer(server: ServerProcess, **more: Any) -> tuple[str, int]:
    """Text and how much of the prompt was cached."""
    with server.http() as http:
        made = http.post("/v1/completions", json=BODY | more).raise_for_status().json()
    return made["choices"][0]["text"], made["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_prefixes_survive_a_restart_of_the_server_and_a_killed_engine(tmp_path: Path) -> None:
    engine = {"kv_cache_mib": 8, "kv_disk_dir": str(tmp_path), "kv_disk_mib": 64}
    with ServerProcess(SMALL, engine=engine) as server:
        cold, cached = answer(server)
        assert cached == 0
        server.stop()
    with ServerProcess(SMALL, engine=engine) as server:
        again, cached = answer(server)
        assert again == cold
        assert cached >= 300
        assert answer(server, cache_salt="another") == (cold, 0)
        kill_engine(server)
        time.sleep(0.1)
        wait_ready(server)
        again, cached = answer(server)
        assert again == cold and cached >= 300
        with server.http() as http:
            metrics = http.get("/metrics").text
        assert 'coppice_kv_tier_up{tier="disk"} 1.0' in metrics
        assert 'coppice_kv_tier_hits_total{tier="disk"} 0.0' not in metrics
        assert server.info()["engine"]["tiers"][0]["state"] == "on"
        assert psutil.pid_exists(server.process.pid)


def test_a_request_cut_by_a_kill_goes_on_from_pages_on_disk(tmp_path: Path) -> None:
    """Nothing else runs: what the next engine reads from the disk, it reads for the replay."""
    engine = {"kv_cache_mib": 64, "kv_disk_dir": str(tmp_path)}
    more = {"max_tokens": 300, "ignore_eos": True}
    with ServerProcess("bundled", engine=engine) as server, server.http() as http:
        text = ""
        with http.stream("POST", "/v1/completions", json=BODY | more | {"stream": True}) as reply:
            events = (line[6:] for line in reply.iter_lines() if line.startswith("data: {"))
            for number, event in enumerate(events):
                text += json.loads(event)["choices"][0]["text"]
                if number == 40:
                    kill_engine(server)
        info = server.wait_idle()
        assert info["engine_restarts"] == 1 and info["requests_replayed"] == 1
        tier = info["engine"]["tiers"][0]
        assert tier["hits"] >= 20, tier
        assert answer(server, **more, cache_salt="undisturbed") == (text, 0)
