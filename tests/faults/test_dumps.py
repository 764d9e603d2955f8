"""What an operator finds after a death: stacks in the log, requests without text in a file."""

from __future__ import annotations

import json
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from coppice.engine.request import Grammar, Request, SamplingParams
from coppice.errors import EngineDeadError
from coppice.server import dumps as room
from coppice.server.deaths import Death
from coppice.server.dumps import Dumps
from coppice.server.replay import LiveRequest
from coppice.server.unread import Unread
from tests.faults.test_replay import kill_engine, text_of
from tests.kits.fake_engine import DIE_AT_TEN, STALL
from tests.kits.models import SMALL
from tests.kits.server import ServerProcess

SECRET = "unmistakable prompt text"
DEATH = Death(EngineDeadError("It died."))


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """Every dump, oldest first, as objects."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    ]


def live(number: int = 0, **fields: Any) -> LiveRequest:
    params = SamplingParams(
        seed=7, n=2, stop=(SECRET,), logit_bias={4242: 1.0},
        grammar=Grammar("regex", SECRET), **fields,
    )  # fmt: skip
    made = LiveRequest(
        Request(id=f"r{number}", prompt=[4242] * 9, sampling=params, tenant="t", key="k",
                deadline_s=60.0),
        Unread(),
    )  # fmt: skip
    made.open[0].tokens += [4242, 4242]
    made.given = made.started = True
    return made


def test_an_engine_that_stands_still_says_where_before_it_is_ended(
    fake_model: Path, tmp_path: Path
) -> None:
    settings = {"engine_hang_s": 2.0, "dump_dir": str(tmp_path / "dumps")}
    with ServerProcess(fake_model, fake={"step_s": 0.002}, server=settings) as server:
        expected = text_of(server)
        assert text_of(server, seed=STALL) == expected
        assert "has said nothing for 2 s" in server.wait_log("in stand_still_in_a_step")
        assert server.info()["engine_restarts"] == 1
    ((head, request),) = read(tmp_path / "dumps")
    assert head["message"] == "The engine stood still and was ended." and head["own_doing"]
    assert request["sampling"]["numbers"]["seed"] == STALL


def test_a_death_leaves_a_dump_that_names_requests_and_holds_no_text(
    fake_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "dumps"
    settings = {"dump_dir": str(folder)}
    body = {"prompt": SECRET, "stop": ["never said"], "regex": ".*", "temperature": 0.5,
            "max_tokens": 300}  # fmt: skip
    with (
        ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        asked = [pool.submit(text_of, server, **body) for _ in range(2)]
        server.wait_running(2, tokens=4)
        kill_engine(server)
        for one in asked:
            one.result()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    said = path.read_text()
    assert SECRET not in said and "never said" not in said and ".*" not in said
    head, *requests = map(json.loads, said.splitlines())
    assert head["requests"] == len(requests) == 2 and not head["own_doing"]
    for line in requests:
        assert line["tenant"] == "default" and line["key"] == "anonymous"
        assert line["prompt_tokens"] == len(SECRET) and line["choices"][0]["tokens"] > 3
        assert line["phase"] == "started" and line["crashes"] == 0
        assert line["sampling"]["numbers"]["temperature"] == 0.5
        assert line["sampling"]["stop"] == 1 and line["sampling"]["grammar"] == "regex"
        assert "text" not in line


def test_an_engine_that_others_end_blames_nobody(tmp_path: Path) -> None:
    settings = {"dump_dir": str(tmp_path / "dumps")}
    with ServerProcess(
        SMALL, start_timeout_s=90, server=settings
    ) as server:  # a real one: it ends as it is told
        kill_engine(server, signal.SIGTERM)
        server.wait_until(lambda info: info["engine_restarts"] == 1)
    ((head,),) = read(tmp_path / "dumps")
    assert "SIGTERM" in head["message"] and not head["own_doing"]


def test_a_poisoned_request_is_named_in_the_dump_with_its_text_only_if_asked_for(
    fake_model: Path, tmp_path: Path
) -> None:
    settings = {"dump_dir": str(tmp_path / "dumps"), "dump_text": True}
    with ServerProcess(fake_model, fake={"step_s": 0.005}, server=settings) as server:
        body = {"prompt": SECRET, "seed": DIE_AT_TEN, "max_tokens": 30, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/v1/completions", timeout=60, json=body)
        assert reply.json()["error"]["code"] == "poisoned"
    dumps = read(tmp_path / "dumps")
    assert [len(dump) for dump in dumps] == [2, 2, 2]
    assert ["poisoned" in head for head, _ in dumps] == [False, False, True]
    assert [line["crashes"] for _, line in dumps] == [0, 1, 2]
    head, line = dumps[-1]
    assert head["poisoned"] == line["id"] and line["alone"]
    assert len(line["text"]["prompt"]) == len(SECRET)


def test_no_dump_holds_more_than_it_may_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_BYTES", 2000)
    dumps = Dumps(tmp_path)
    (tmp_path / "mine.jsonl").write_text("kept")
    made = [dumps.engine_died(DEATH, map(live, range(50)), None, n) for n in range(25)]
    left = sorted(tmp_path.glob("crash-*"))
    assert left == sorted(path for path in made[-room.MAX_FILES :] if path)
    for path in left:
        text = path.read_text()
        assert len(text) < 2100 and json.loads(text.splitlines()[-1]) == {"truncated": True}
        assert SECRET not in text and "4242" not in text
    assert (tmp_path / "mine.jsonl").read_text() == "kept"


def test_text_is_there_when_asked_for(tmp_path: Path) -> None:
    path = Dumps(tmp_path, with_text=True).engine_died(DEATH, [live()], None, 0)
    assert path is not None
    _, line = map(json.loads, path.read_text().splitlines())
    assert line["text"]["prompt"] == [4242] * 9 and line["text"]["choices"]["0"] == [4242] * 2
    assert line["text"]["stop"] == [SECRET] and line["text"]["grammar"]["source"] == SECRET


def test_a_folder_that_cannot_be_had_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert Dumps(tmp_path / "file").engine_died(DEATH, [live()], None, 0) is None
    assert "No crash dump" in caplog.text


def test_a_real_engine_writes_its_stacks_and_goes_on() -> None:
    with ServerProcess("bundled", start_timeout_s=90) as server:
        kill_engine(server, signal.SIGUSR1)
        assert len(text_of(server, max_tokens=4)) > 0
        server.wait_log("in _take_messages")
        assert server.info()["engine_restarts"] == 0
