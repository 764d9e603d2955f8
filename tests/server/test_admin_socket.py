"""What operates a server is on a socket of its own, for the owner of its file, and nowhere else."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from coppice.cli.admin import ask
from coppice.cli.app import app
from coppice.cli.remote import RemoteError
from coppice.errors import ConfigError
from coppice.server.admin import AdminSocket
from coppice.server.guard import ADMIN_POLICIES
from tests.kits.server import ServerProcess

LONG = {"prompt": "abc", "max_tokens": 2000, "ignore_eos": True, "stream": True}
KEY = "a-key-of-the-clients"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.sock"


@pytest.fixture
def server(fake_model: Path, path: Path) -> Iterator[ServerProcess]:
    settings = {"admin_socket": str(path), "api_key": KEY}
    with ServerProcess(fake_model, fake={"step_s": 0.005}, server=settings) as made:
        yield made


def begin(server: ServerProcess, request_id: str) -> tuple[httpx.Client, httpx.Response]:
    http = server.http(headers_more={"X-Request-Id": request_id})
    reply = http.send(http.build_request("POST", "/v1/completions", json=LONG), stream=True)
    assert reply.status_code == 200
    return http, reply


def test_the_owner_sees_cancels_and_dumps_without_a_key(server: ServerProcess, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    http, reply = begin(server, "theirs")
    with closing(http):
        state: dict[str, Any] = ask(str(path), "GET", "/admin/state")
        assert state["state"] == "ok" and state["engine"]["pid"] > 0
        (call,) = state["calls"]
        assert call["request_id"] == "theirs" and call["tenant"] == "default"
        assert call["prompt_tokens"] == 3 and "abc" not in str(state)
        cancelled = ask(str(path), "POST", "/admin/requests/theirs/cancel")
        assert cancelled == {"id": "theirs", "cancelled": 1}
        assert "data: [DONE]" in "".join(reply.iter_text())
    with pytest.raises(RemoteError, match="No request of that id"):
        ask(str(path), "POST", "/admin/requests/theirs/cancel")
    dumped = ask(str(path), "POST", "/admin/dump")
    assert any("admin.py" in line for line in dumped["stacks"]) and dumped["engine_stacks_in_log"]
    server.wait_log("fake_engine.py")
    assert ask(str(path), "GET", "/admin/state")["engine"]["restarts"] == 0


def test_nothing_of_it_is_on_the_public_port(server: ServerProcess) -> None:
    for template in ADMIN_POLICIES:
        where = template.replace("{request_id}", "x")
        with httpx.Client(base_url=server.url) as stranger, server.http() as client:
            for verb in ("GET", "POST"):
                assert stranger.request(verb, where).status_code == 401
                assert client.request(verb, where).status_code == 404
    assert "/admin" not in server.http().get("/openapi.json").text


def test_the_engine_is_replaced_and_its_requests_go_on(server: ServerProcess, path: Path) -> None:
    def text() -> str:
        with server.http() as http:
            body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True}
            return str(http.post("/v1/completions", json=body).json()["choices"][0]["text"])

    expected, before = text(), ask(str(path), "GET", "/admin/state")["engine"]["pid"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(text)
        server.wait_running(1)
        told = CliRunner().invoke(
            app, ["admin", "replace", "--notice-s", "20", "--admin-socket", str(path)]
        )
        replaced = json.loads(told.stdout)
        assert running.result() == expected
    assert replaced["pid"] != before and replaced["took_s"] < 20
    with pytest.raises(RemoteError, match="notice_s"):
        ask(str(path), "POST", "/admin/replace?notice_s=-1")


def test_drain_over_the_socket_is_a_first_sigterm(server: ServerProcess, path: Path) -> None:
    http, reply = begin(server, "last")
    with closing(http):
        assert ask(str(path), "POST", "/admin/drain") == {"state": "draining"}
        server.wait_log("draining: ")
        assert ask(str(path), "GET", "/admin/state")["state"] == "draining"
        with server.http() as more:
            assert more.post("/v1/completions", json=LONG).status_code == 503
        ask(str(path), "POST", "/admin/requests/last/cancel")
        assert "data: [DONE]" in "".join(reply.iter_text())
    assert server.process.wait(10) == 0
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_and_a_live_one_is_not(
    fake_model: Path, path: Path
) -> None:
    first = ServerProcess(fake_model, fake={}, server={"admin_socket": str(path)})
    first.wait_ready()
    second = ServerProcess(fake_model, fake={}, server={"admin_socket": str(path)})
    assert second.exited(30) == 2
    assert "another server listens there" in "".join(second.log)
    assert ask(str(path), "GET", "/admin/state")["state"] == "ok"
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert path.exists()
    with pytest.raises(RemoteError, match="is it running"):
        ask(str(path), "GET", "/admin/state")
    with ServerProcess(fake_model, fake={}, server={"admin_socket": str(path)}):
        assert ask(str(path), "GET", "/admin/state")["state"] == "ok"
    assert not path.exists()


def test_what_is_no_socket_is_never_removed(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        AdminSocket(path)
    assert path.read_text() == "mine"
    path.unlink()
    made = AdminSocket(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        made.close()
        assert path.exists()  # it was not ours any more
    with pytest.raises(ConfigError, match="admin socket"):
        AdminSocket(path.parent / "missing" / "admin.sock")


def test_a_stranger_of_the_machine_cannot_open_it(path: Path) -> None:
    made = AdminSocket(path)
    if os.getuid() == 0:
        path.parent.chmod(0o755)
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as probe:
                os._exit(probe.connect_ex(str(path)) != 13)  # EACCES
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made.close()
    assert not path.exists()
