"""Streams that are taken up again: over cuts, takeovers, restarts and full disks."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coppice.server.keys import hash_key
from tests.kits.injector import WrongClock
from tests.kits.load import CHAT, COMPLETE, ask
from tests.kits.resuming import Reading, free_port, read_through
from tests.kits.server import ServerProcess

PROMPT: dict[str, Any] = {"prompt": "abcdefg", "max_tokens": 60, "ignore_eos": True}
SAY = [{"role": "user", "content": "abc"}]
BODIES = [
    (COMPLETE, PROMPT),
    (COMPLETE, PROMPT | {"n": 3, "logprobs": 2}),
    (COMPLETE, {"prompt": ["abcd", "efgh"], "n": 2, "max_tokens": 30, "ignore_eos": True}),
    (COMPLETE, PROMPT | {"stop": ["efga"], "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": SAY, "max_tokens": 60, "ignore_eos": True, "n": 2, "logprobs": True}),
    (CHAT, {"messages": SAY, "max_tokens": 40, "ignore_eos": True,
            "stream_options": {"include_usage": True}}),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(fake_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    settings = {"journal": str(tmp_path_factory.mktemp("journal")), "resume_s": 5.0}
    with ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server:
        yield server


@pytest.mark.parametrize("index", range(len(BODIES)))
def test_cut_anywhere_every_token_comes_once(server: ServerProcess, index: int) -> None:
    rng = random.Random(index)
    with server.http() as http:
        expected = ask(http, BODIES[index], stream=False)
    reading = read_through(
        server.http, BODIES[index], f"cut-{index}", cut_after=lambda: rng.randrange(1, 30)
    )
    assert reading.answer == expected and reading.cuts > 0 and len(reading.ids) == 1
    wants_usage = "stream_options" in BODIES[index][1]
    assert (reading.usage is not None) == wants_usage
    again = Reading()
    with server.http() as http, http.stream("GET", f"/v1/requests/cut-{index}/stream") as reply:
        again.take(reply.iter_lines())
    assert again.answer == expected, "an ended stream can be read once more"


def test_a_client_that_leaves_for_good_is_cancelled_after_a_while(server: ServerProcess) -> None:
    before = server.wait_idle()["outcomes"]["cancelled"]
    body = PROMPT | {"max_tokens": 1900, "stream": True}
    headers = {"X-Resumable": "true", "X-Request-Id": "left"}
    with server.http() as http, http.stream("POST", COMPLETE, json=body, headers=headers) as reply:
        assert reply.headers["x-resumable"] == "true"
        next(reply.iter_lines())
    time.sleep(0.8)
    assert server.info()["outcomes"]["in_flight"] == 1, "it runs on for a while"
    info = server.wait_idle()
    assert info["outcomes"]["cancelled"] == before + 1 and info["engine"]["pages_used"] == 0
    with server.http() as http, http.stream("GET", "/v1/requests/left/stream") as reply:
        reading = Reading()
        reading.take(reply.iter_lines())
    assert reading.answer[0].finish == "length" and len(reading.answer[0].text) > 50


def test_who_did_not_ask_for_it_is_cancelled_at_once(server: ServerProcess) -> None:
    body = PROMPT | {"max_tokens": 1900, "stream": True}
    headers = {"X-Request-Id": "plain"}
    with server.http() as http, http.stream("POST", COMPLETE, json=body, headers=headers) as reply:
        assert "x-resumable" not in reply.headers
        assert not next(reply.iter_lines()).startswith("id:")
    server.wait_until(lambda info: info["outcomes"]["in_flight"] == 0, 3.0)  # resume_s is 5
    with server.http() as http:
        reply = http.get("/v1/requests/plain/stream")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_resumable")


def test_a_second_reader_takes_over(server: ServerProcess) -> None:
    body = PROMPT | {"max_tokens": 300, "stream": True}
    headers = {"X-Resumable": "true", "X-Request-Id": "two"}
    reading = Reading()
    with (
        server.http() as http,
        server.http() as other,
        http.stream("POST", COMPLETE, json=body, headers=headers) as first,
    ):
        lines = first.iter_lines()
        next(lines)
        with other.stream("GET", "/v1/requests/two/stream") as second:
            reading.take(second.iter_lines())
        rest = list(lines)
    assert len(reading.answer[0].text) == 300
    assert "event: error" in rest and '"code":"taken_over"' in "".join(rest)


def test_a_name_in_use_is_refused(server: ServerProcess) -> None:
    """Of two streams of one name one could never be taken up."""
    body = PROMPT | {"max_tokens": 1900, "stream": True}
    headers = {"X-Resumable": "true", "X-Request-Id": "named"}
    with server.http() as http, server.http() as other:
        with http.stream("POST", COMPLETE, json=body, headers=headers) as first:
            next(first.iter_lines())
            reply = other.post(COMPLETE, json=body, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "request_id_in_use")
        assert other.post("/v1/requests/named/cancel").status_code == 200


def test_no_place_in_the_stream_is_a_400(server: ServerProcess) -> None:
    read_through(server.http, BODIES[0], "places")
    with server.http() as http:
        for after in ("x", "-1", "1.2", "1" * 12, "1."):
            reply = http.get("/v1/requests/places/stream", params={"after": after})
            assert reply.status_code == 400, after
        assert http.get("/v1/requests/nobody/stream").status_code == 404
        assert http.get("/v1/requests/%00/stream").status_code == 404


def test_only_the_same_tenant_may_take_a_stream_up(fake_model: Path, tmp_path: Path) -> None:
    names = ("ann", "bob")
    keys = [{"name": n, "sha256": hash_key(f"{n}-secret"), "tenant": n} for n in names]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(keys))
    journal = tmp_path / "journal"
    settings = {"journal": str(journal), "api_keys_file": str(file)}
    with ServerProcess(fake_model, fake={"step_s": 0.0}, server=settings) as server:
        server.key = "ann-secret"
        reading = read_through(server.http, BODIES[0], "mine")
        for key, status in (("ann-secret", 200), ("bob-secret", 404), ("cat-secret", 401)):
            server.key = key
            for name in ("mine", *reading.ids):
                with server.http() as http:
                    assert http.get(f"/v1/requests/{name}/stream").status_code == status
    written = b"".join(path.read_bytes() for path in journal.glob("segment-*"))
    assert b"ann" in written and b"secret" not in written
    assert journal.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in journal.iterdir())


def test_a_server_without_a_journal_says_so(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.0}) as server, server.http() as http:
        reply = http.post(COMPLETE, json=PROMPT | {"stream": True}, headers={"X-Resumable": "true"})
        assert reply.status_code == 200 and "x-resumable" not in reply.headers
        reply = http.get(f"/v1/requests/{reply.headers['x-request-id']}/stream")
        assert reply.status_code == 404 and "--journal" in reply.json()["error"]["message"]


def test_one_journal_has_one_server(fake_model: Path, tmp_path: Path) -> None:
    settings = {"journal": str(tmp_path)}
    with ServerProcess(fake_model, fake={}, server=settings):
        second = ServerProcess(fake_model, fake={}, server=settings)
        assert second.exited(20) == 2
        assert "its own folder" in "".join(second.log)


def test_what_another_model_began_is_not_gone_on_with(fake_model: Path, tmp_path: Path) -> None:
    settings = {"journal": str(tmp_path)}
    fake = {"step_s": 0.02, "new_weights": True}
    with ServerProcess(fake_model, fake=fake, server=settings) as server, server.http() as http:
        headers = {"X-Resumable": "true", "X-Request-Id": "old"}
        body = PROMPT | {"max_tokens": 900, "stream": True}
        with http.stream("POST", COMPLETE, json=body, headers=headers) as reply:
            next(reply.iter_lines())
            server.process.kill()
    with ServerProcess(fake_model, fake=fake, server=settings) as server, server.http() as http:
        reply = http.get("/v1/requests/old/stream")
        assert '"code":"model_changed"' in reply.text
        assert server.info()["outcomes"]["failed"] == 1
        assert server.info()["engine"]["running"] == 0


def test_a_restart_on_purpose_is_a_pause_too(fake_model: Path, tmp_path: Path) -> None:
    settings = {"journal": str(tmp_path), "drain_s": 0.2}
    body = (COMPLETE, PROMPT | {"max_tokens": 200})
    reading, expected = Reading(), ""
    with ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server:
        with server.http() as http:
            expected = http.post(COMPLETE, json=body[1]).json()["choices"][0]["text"]
            headers = {"X-Resumable": "true", "X-Request-Id": "drained"}
            with http.stream("POST", COMPLETE, json=body[1] | {"stream": True},
                             headers=headers) as reply:  # fmt: skip
                server.process.terminate()
                reading.take(reply.iter_lines())
        assert reading.drains == 1 and not reading.done
        assert server.process.wait(10) == 0
    with ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server:
        path = f"/v1/requests/drained/stream?after={reading.place}"
        with server.http() as http, http.stream("GET", path) as reply:
            reading.take(reply.iter_lines())
        assert reading.answer[0].text == expected and len(set(reading.places)) == 200


def test_the_sample_of_the_docs_tells_the_whole_story_over_a_drain(
    fake_model: Path, tmp_path: Path, repo_root: Path
) -> None:
    page = (repo_root / "docs" / "howto" / "resume.md").read_text()
    (sample,) = re.findall(r"^```python run server\n(.*?)^```", page, re.M | re.S)
    settings = {"journal": str(tmp_path), "drain_s": 0.2, "port": free_port()}
    fake = {"step_s": 0.05}
    with ServerProcess(fake_model, fake=fake, server=settings) as server:
        with server.http() as http:
            body = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 1}
            expected = http.post(COMPLETE, json=body).json()["choices"][0]["text"]
        program = sample.replace("http://127.0.0.1:8000", server.url)
        telling = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        assert telling.stdout is not None
        told = telling.stdout.read(1)
        server.process.terminate()
        assert server.process.wait(10) == 0
    assert telling.poll() is None, "it takes a cut for the end"
    with ServerProcess(fake_model, fake=fake, server=settings) as server:
        told += telling.communicate(timeout=30)[0]
    assert telling.returncode == 0 and told == expected


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_set_while_the_server_was_dead_ends_and_forgets_nothing(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    clock = WrongClock(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    settings, fake = {"journal": str(tmp_path / "journal")}, {"step_s": 0.01}
    wanted = {"long": {"max_tokens": 150, "deadline_s": 60}, "late": {"deadline_s": 2.0}}
    with ServerProcess(fake_model, fake=fake, server=settings) as server, server.http() as http:
        ended = read_through(server.http, (COMPLETE, PROMPT | {"max_tokens": 3}), "ended")
        for name, fields in wanted.items():
            headers = {"X-Resumable": "true", "X-Request-Id": name}
            body = PROMPT | {"max_tokens": 1900, "stream": True} | fields
            with http.stream("POST", COMPLETE, json=body, headers=headers) as reply:
                next(reply.iter_lines())
        server.process.kill()
    clock.shift(jump_s)
    with ServerProcess(fake_model, fake=fake, server=settings) as server, server.http() as http:
        now = http.post(COMPLETE, json=PROMPT | {"max_tokens": 1}).json()["created"]
        assert abs(now - time.time() - jump_s) < 60, "the clock did not jump: it tested nothing"
        readings = {name: Reading() for name in ("ended", *wanted)}
        for name, reading in readings.items():
            with http.stream("GET", f"/v1/requests/{name}/stream") as reply:
                assert reply.status_code == 200, name
                reading.take(reply.iter_lines())
    assert readings["ended"].answer == ended.answer
    assert len(readings["long"].answer[0].text) == 150
    assert 0 < len(readings["late"].answer[0].text) < 1000, "its time was up"
