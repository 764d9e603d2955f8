"""What a server lets in and gives away: its port, its files, its errors, what it fetches."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from coppice.errors import ConfigError
from coppice.server import ServerConfig
from coppice.server.guard import ADMIN_POLICIES
from tests.kits.server import ServerProcess
from tests.kits.wire import Wire

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
INSIDE = re.compile(
    r"Traceback|/src/|/site-packages/|\.py\b|\.rs\b|0x[0-9a-f]{6,}|pydantic|jinja2|llguidance|"
    r"msgspec|tokenizers|/tmp/|panicked| object at "
)
"""What no error may hold: files, addresses and libraries."""


def post(server: ServerProcess, path: str, body: Any, **headers: str) -> httpx.Response:
    with server.http(headers_more=headers) as http:
        return http.post(path, json=body)


class Ears:
    """A port of this machine, of either protocol, that hears who comes."""

    def __init__(self) -> None:
        self._closing = ExitStack()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Ears:
        first = self._listen(socket.AF_INET, "127.0.0.1", 0)
        self.port = first.getsockname()[1]
        if socket.has_ipv6:
            self._listen(socket.AF_INET6, "::1", self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _listen(self, family: socket.AddressFamily, host: str, port: int) -> socket.socket:
        made = self._closing.enter_context(socket.socket(family))
        made.bind((host, port))
        made.listen(64)
        made.setblocking(False)
        self._sockets.append(made)
        return made

    def heard(self) -> int:
        """How many have come since it was last asked, whether they stayed or not."""
        count = 0
        for each in self._sockets:
            try:
                while True:
                    each.accept()[0].close()
                    count += 1
            except BlockingIOError:
                pass
        return count


def naming(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests that name an address wherever one might be looked up."""
    parts: list[Any] = [
        {"type": kind, kind: value}
        for kind in ("image_url", "video_url", "audio_url", "input_image", "input_file", "file")
        for value in (url, {"url": url, "detail": "high"}, {"file_url": url}, {"file_id": url})
    ]
    parts += [
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "text", "text": url},
    ]
    schema = {"$schema": url, "$id": url, "$ref": url, "type": "object"}
    formats: list[dict[str, Any]] = [
        {"type": "json_schema", "json_schema": {"name": "s", "schema": each}}
        for each in (schema, {"type": "object", "properties": {"a": {"$ref": url + "#/a"}}})
    ]
    tools: list[dict[str, Any]] = [
        {"type": "mcp", "server_label": "x", "server_url": url},
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "web_search", "url": url},
    ]
    fields = (
        "model", "user", "cache_salt", "chat_template", "lora", "documents", "metadata", "webhook",
        "callback_url", "store", "prediction", "prompt_embeds", "guided_json", "grammar", "regex",
        "media_io_kwargs", "mm_processor_kwargs", "image", "images", "context", "suffix",
    )  # fmt: skip
    made: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": [part]}]}) for part in parts
    ]
    made += [(CHAT, {"messages": [{"role": "user", "content": url, "name": url[:64]}]})]
    made += [(TEXT, {"prompt": url, "response_format": each}) for each in formats]
    made += [
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [each]}) for each in tools
    ]
    for field in fields:
        made += [(TEXT, {"prompt": "a", field: value}) for value in (url, [url], {"url": url})]
    made += [(TEXT, {"prompt": "a", "grammar": f'%import "{url}" (x)\nstart: x'})]
    return made


def test_the_server_fetches_nothing_a_request_names(server: ServerProcess) -> None:
    with Ears() as ears:
        at = f"127.0.0.1:{ears.port}"
        for url in (f"http://{at}/a.png", f"http:\\\\{at}\\@evil/", f"//localhost:{ears.port}/"):
            for path, body in naming(url):
                reply = post(server, path, {"max_tokens": 2} | body)
                assert reply.status_code in (200, 400, 404), (body, reply.text)
                assert not ears.heard(), body
            hints = {"Referer": url, "X-Forwarded-Host": at, "Forwarded": f"host={at}", "From": url}
            assert post(server, TEXT, {"prompt": "a"}, **hints).status_code == 200
            with server.http() as http:
                assert http.get(f"/v1/models/{url}").status_code == 404
        time.sleep(0.3)  # for one that asks later
        assert ears.heard() == 0
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, ears.port)).close()
            assert ears.heard() == 1, "it would have been heard"


def test_the_control_plane_is_not_on_the_port(server: ServerProcess) -> None:
    assert len(ADMIN_POLICIES) >= 5
    with server.http() as http:
        for path in ADMIN_POLICIES:
            for verb in ("GET", "POST", "PUT", "DELETE"):
                for prefix in ("", "/v1", "/page/.."):
                    where = prefix + path.format(request_id="x")
                    assert http.request(verb, where).status_code in (404, 405), where
    assert server.info()["outcomes"]["accepted"] >= 0, "and it serves on"


def test_a_model_name_is_no_path(server: ServerProcess) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "fake/../fake", "sha256:..%2f", "fake\0"):
        reply = post(server, TEXT, {"prompt": "a", "model": name})
        wanted = 400 if "\0" in name else 404
        assert reply.status_code == wanted and "error" in reply.json(), name


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/..%5capp.py",
        "/page/..\\app.py", "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/....//app.py",
        "/page/page.js/../../app.py", "/page/%00", "/page/", "/page/.", "/../app.py",
        "/v1/models/../../etc/passwd", "/v1/models/..%2f..%2fapp.py",
        "/v1/requests/..%2f..%2fx/stream",
    ],
)  # fmt: skip
def test_a_path_leads_to_no_file_but_the_pages_own(server: ServerProcess, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with Wire(server.port, timeout_s=10.0) as wire:
        said = wire.send(head.encode()).rest()
    assert said[9:12] in (b"404", b"405", b"400"), said[:200]
    assert b"def build_app" not in said and b"root:" not in said


def test_no_name_of_a_request_becomes_a_file(fake_model: Path, tmp_path: Path) -> None:
    """Ids, salts, users: with everything on that writes files."""
    folders = {name: str(tmp_path / "kept" / name) for name in ("journal", "dump_dir")}
    names = ("../../out", "..", "/tmp/out", str(tmp_path / "out"), "a/../../out", "out.x")
    accepted = 0
    with ServerProcess(fake_model, fake={"step_s": 0.002}, server=folders) as server:
        for name in names:
            body = {"prompt": "a", "max_tokens": 2, "stream": True, "cache_salt": name,
                    "user": name, "metadata": {"path": name}}  # fmt: skip
            reply = post(server, TEXT, body, **{"X-Resumable": "true", "X-Request-Id": name})
            assert reply.status_code == (400 if "/" in name or name == ".." else 200), name
            accepted += reply.status_code == 200
            again = {"X-Resumable": "true"}
            assert post(server, TEXT, body, **again).status_code == 200
        written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*")}
        files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert accepted == 1 and files, "the journal was written"
    assert written <= {("kept",), ("kept", "journal"), ("kept", "dump_dir")}
    assert not [name for name in files if "out" in name]


def test_a_page_of_another_name_or_origin_is_turned_away(server: ServerProcess) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"):
        assert post(server, TEXT, body, Host=host).status_code == 403, host
    for origin in ("http://evil.example", "null", "https://localhost.evil.example", "file://"):
        assert post(server, TEXT, body, Origin=origin).status_code == 403, origin
    with server.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            reply = http.post(TEXT, content=json.dumps(body), headers={"Content-Type": kind})
            assert reply.status_code == 415
        asks = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
        for each in (reply, http.options(TEXT, headers=asks), http.get("/", headers=asks)):
            assert not [name for name in each.headers if name.startswith("access-control")]


def test_an_error_tells_nothing_of_our_insides(server: ServerProcess) -> None:
    raw = (b"{", b"\xff", b'{"prompt": {"a": 1}}', b'{"n": "x"}', b"[" * 99, b"1e999")
    fields: tuple[dict[str, Any], ...] = (
        {"prompt": "\ud800"}, {"regex": "("}, {"regex": "(?=a)"}, {"grammar": "start: x"},
        {"grammar": 'start: "a'}, {"logit_bias": {"x": 1}}, {"seed": 666}, {"stop": [1]},
        {"chat_template": "{{ messages.append }}"}, {"temperature": "hot"}, {"prompt": [[1], "a"]},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "schema": {"type": "string", "pattern": "("}}}},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "schema": {"$ref": "#/$defs/a"}}}},
    )  # fmt: skip
    said = []
    with server.http() as http:
        for path in (TEXT, CHAT, CHAT + "/render", "/tokenize", "/detokenize"):
            for content in raw:
                kind = {"Content-Type": "application/json"}
                said.append(http.post(path, content=content, headers=kind))
        for field in fields:
            body = {"prompt": "abcdef", "max_tokens": 4} | field
            said.append(http.post(TEXT, content=json.dumps(body),
                                  headers={"Content-Type": "application/json"}))  # fmt: skip
        said += [http.get("/nowhere"), http.delete(TEXT), http.get("/v1/models/x")]
    for reply in said:
        assert 400 <= reply.status_code <= 500, reply.text
        assert set(reply.json()) == {"error", "request_id"}
        assert not INSIDE.search(reply.text), reply.text
    assert sum(reply.status_code == 500 for reply in said) == 1, "the row that failed"


def test_a_wide_address_without_a_key_does_not_start() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):
        with pytest.raises(ConfigError, match="api_key"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, api_key="k" * 8).host == host
    assert ServerConfig().host == "127.0.0.1"
