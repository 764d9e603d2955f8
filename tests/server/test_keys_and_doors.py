"""Keys, hosts, origins, and transport limits."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from coppice.server.keys import hash_key
from tests.kits.server import ServerProcess

KEYS = [
    {"name": "ann", "sha256": hash_key("ann-secret"), "tenant": "a"},
    {"name": "bob", "sha256": hash_key("bob-secret"), "tenant": "b", "share": 0.25},
    {"name": "old", "sha256": hash_key("old-secret"), "expires": "2020-01-01T00:00:00+00:00"},
    {"name": "few", "sha256": hash_key("few-secret"), "rate_per_minute": 2},
]


@pytest.fixture(scope="module")
def keyed(fake_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(KEYS))
    settings = {
        "api_keys_file": str(path), "max_in_flight": 8, "connections_per_key": 6,
        "max_body_bytes": 4096, "body_timeout_s": 1.0, "header_timeout_s": 1.0,
    }  # fmt: skip
    with ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server:
        server.key = "ann-secret"
        yield server


def get(server: ServerProcess, path: str, key: str | None, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30.0, verify=False) as http:
        return http.request(fields.pop("method", "GET"), path, **fields)


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (None, "unauthorized"), ("wrong", "invalid_api_key"),
        ("ann-secre", "invalid_api_key"), ("ANN-SECRET", "invalid_api_key"),
        ("old-secret", "expired_api_key"), (hash_key("ann-secret"), "invalid_api_key"),
        ("x" * 600, "unauthorized"),
    ],
)  # fmt: skip
def test_every_route_but_liveness_needs_a_key(
    keyed: ServerProcess, key: str | None, code: str
) -> None:
    document = get(keyed, "/openapi.json", "ann-secret").json()
    paths = [*document["paths"], "/openapi.json", "/nowhere", "/v1/models/../models"]
    for path in paths:
        reply = get(keyed, path.replace("{", "").replace("}", ""), key)
        if path == "/health/live":
            assert reply.status_code == 200
        else:
            assert reply.status_code == 401, path
            assert reply.json()["error"]["code"] == code
            assert reply.headers["www-authenticate"] == "Bearer"


def test_good_keys_are_let_in(keyed: ServerProcess) -> None:
    for key in ("ann-secret", "bob-secret"):
        assert get(keyed, "/v1/models", key).status_code == 200


def test_a_key_over_its_rate_gets_429(keyed: ServerProcess) -> None:
    codes = []
    for _ in range(4):
        body = {"prompt": "a", "max_tokens": 1}
        reply = get(keyed, "/v1/completions", "few-secret", method="POST", json=body)
        codes.append(reply.status_code)
    assert codes == [200, 200, 429, 429]
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert reply.json()["error"]["code"] == "rate_exceeded"


def test_a_tenant_over_its_share_gets_429_and_others_do_not(keyed: ServerProcess) -> None:
    body = {"prompt": "abc", "max_tokens": 80, "ignore_eos": True}

    def ask(key: str) -> httpx.Response:
        return get(keyed, "/v1/completions", key, method="POST", json=body)

    with ThreadPoolExecutor(8) as pool:
        bobs = [pool.submit(ask, "bob-secret") for _ in range(5)]
        anns = [pool.submit(ask, "ann-secret") for _ in range(3)]
    codes = [reply.result().status_code for reply in bobs]
    assert codes.count(200) >= 2 and set(codes) == {200, 429}
    assert [reply.result().status_code for reply in anns] == [200] * 3


def test_too_many_requests_at_once_of_one_key(keyed: ServerProcess) -> None:
    body = {"prompt": "abc", "max_tokens": 1, "seed": 668, "deadline_s": 0.5}
    with ThreadPoolExecutor(10) as pool:
        replies = list(
            pool.map(
                lambda _: get(keyed, "/v1/completions", "ann-secret", method="POST", json=body),
                range(10),
            )
        )
    codes = {reply.json()["error"]["code"] for reply in replies if reply.status_code == 429}
    assert codes == {"too_many_connections"}


def test_one_tenant_cannot_cancel_anothers_request(keyed: ServerProcess) -> None:
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "stream": True}
    headers = {"Authorization": "Bearer ann-secret", "X-Request-Id": "anns"}
    with httpx.Client(base_url=keyed.url) as http:
        request = http.build_request("POST", "/v1/completions", json=body, headers=headers)
        reply = http.send(request, stream=True)
        path = "/v1/requests/anns/cancel"
        assert get(keyed, path, "bob-secret", method="POST").status_code == 404
        assert get(keyed, path, "ann-secret", method="POST").status_code == 200
        reply.close()


def test_a_key_sees_what_its_own_tenant_used_and_no_other(keyed: ServerProcess) -> None:
    for key in ("ann-secret", "bob-secret"):
        body = {"prompt": "abc", "max_tokens": 1}
        assert get(keyed, "/v1/completions", key, method="POST", json=body).status_code == 200

    def seen(key: str) -> set[str]:
        usage = get(keyed, "/v1/coppice/info", key).json()["engine"]["usage"]
        return {used["tenant"] for used in usage}

    deadline = time.monotonic() + 10
    while not (seen("ann-secret") and seen("bob-secret")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert seen("ann-secret") == {"a"}
    assert seen("bob-secret") == {"b"}


def test_unknown_host_and_foreign_origin_are_refused(keyed: ServerProcess) -> None:
    rebound = get(keyed, "/health/live", None)
    assert rebound.status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        with httpx.Client(base_url=keyed.url) as http:
            reply = http.get("/health/live", headers={"Host": host})
            assert reply.status_code in (400, 403), host
    with keyed.http() as http:
        for origin in ("http://evil.example", "null"):
            reply = http.post("/tokenize", json={"prompt": "a"}, headers={"Origin": origin})
            assert reply.status_code == 403
            reply = http.get("/v1/models", headers={"Origin": origin})
            assert reply.status_code == 403  # a read may do something, as taking a stream over
        assert "access-control-allow-origin" not in reply.headers
        own = http.post("/tokenize", json={"prompt": "a"}, headers={"Origin": keyed.url})
        assert own.status_code == 200


def test_body_limits_and_labels(keyed: ServerProcess) -> None:
    body = json.dumps({"prompt": "x" * 4000}).encode()
    with keyed.http() as http:

        def post(content: Any, **headers: str) -> httpx.Response:
            headers = {"Content-Type": "application/json"} | headers
            return http.post("/v1/completions", content=content, headers=headers)

        assert post(body + b" " * (4096 - len(body))).status_code in (200, 400)
        assert post(body + b" " * (4097 - len(body))).status_code == 413
        assert post(iter([body] * 3)).status_code == 413  # chunked, length unknown
        assert post(body * 3).status_code == 413
        assert post(b"{}", **{"Content-Encoding": "gzip"}).status_code == 415
        assert post(b"{}", **{"Content-Type": "text/plain"}).status_code == 415
        assert (
            post(b"{}", **{"Content-Type": "application/json; charset=latin-1"}).status_code == 415
        )
        assert post(b"").status_code == 400
        fine = {"Content-Type": "application/json; charset=UTF-8"}
        assert post(b'{"prompt": "a"}', **fine).status_code == 200
        many = {f"X-Header-{number}": "a" for number in range(101)}
        assert post(b'{"prompt": "a"}', **many).status_code == 431


def raw(server: ServerProcess, *parts: bytes, pause_s: float = 0.0, wait_s: float = 5.0) -> bytes:
    """Send bytes as they are, and read until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(wait_s)
        made = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            while data := connection.recv(65536):
                made += data
        except (TimeoutError, ConnectionError):
            pass
        return made


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ann-secret\r\n"
JSON_TYPE = b"Content-Type: application/json\r\n"


def test_raw_socket_abuse_is_answered_or_closed(keyed: ServerProcess) -> None:
    assert b" 431 " in raw(keyed, HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n")
    assert b" 431 " in raw(keyed, HEAD + b"".join(b"X%d: a\r\n" % i for i in range(20_000)))
    assert b" 408 " in raw(keyed, HEAD, b"X: slow")  # headers never end
    assert raw(keyed, wait_s=4.0) == b""  # says nothing at all
    slow = HEAD + JSON_TYPE + b"Content-Length: 100\r\n\r\n"
    assert b" 408 " in raw(keyed, slow, b'{"prom')
    assert b" 400 " in raw(keyed, HEAD + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n")
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 400 " in raw(keyed, HEAD + JSON_TYPE + both + b"0\r\n\r\n", wait_s=3.0)
    assert b" 400 " in raw(keyed, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200)
    assert b" 40" in raw(keyed, b"GET / HTTP/9.9\r\n\r\n")
    assert b" 400 " in raw(keyed, b"\r\n\r\n\x00\xff\xfe garbage\r\n\r\n")
    bad_chunk = HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"
    raw(keyed, bad_chunk, wait_s=2.0)
    pipelined = (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n") * 20
    assert raw(keyed, pipelined, wait_s=2.0).count(b" 200 ") == 20
    endless = HEAD + JSON_TYPE + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 1024
    assert b" 413 " in raw(keyed, endless, *[b"\r\n400\r\n" + b"a" * 1024] * 4)
    with keyed.http() as http:
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_connections_are_bounded(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={}, server={"max_connections": 5}) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        time.sleep(0.2)
        refused = raw(server)
        assert b" 503 " in refused and b"Retry-After" in refused
        for connection in held:
            connection.close()
        live = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        deadline = time.monotonic() + 5
        while b" 200 " not in raw(server, live):
            assert time.monotonic() < deadline
        assert server.client().completions.create(model="fake", prompt="a").choices


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"host": "0.0.0.0"}, "api_key"), ({"host": "::"}, "api_key"),
        ({"api_key": "short"}, "at least 8"), ({"api_keys_file": "/nonexistent"}, "keys file"),
        ({"max_in_flight": 0}, "at least 1"), ({"dump_dir": "/dev/null"}, "dump"),
    ],
)  # fmt: skip
def test_unsafe_or_wrong_settings_refuse_to_start(
    fake_model: Path, settings: dict[str, Any], word: str
) -> None:
    server = ServerProcess(fake_model, fake={}, server=settings)
    assert server.exited(30) == 2
    log = "".join(server.log)
    assert word in log and "Traceback" not in log


def test_a_keys_file_without_keys_lets_nobody_in(fake_model: Path, tmp_path: Path) -> None:
    """It opened the server to everybody who could reach it."""
    (tmp_path / "keys.json").write_text("[]")
    settings = {"host": "0.0.0.0", "api_keys_file": str(tmp_path / "keys.json")}
    server = ServerProcess(fake_model, fake={}, server=settings)
    assert server.exited(30) == 2
    assert "holds no key" in "".join(server.log)


def test_taken_port_says_what_to_do(fake_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ServerProcess(fake_model, fake={}, server={"port": taken.getsockname()[1]})
        assert server.exited(30) == 2
    assert "choose another port" in "".join(server.log)


def test_log_has_no_prompt_and_no_key(keyed: ServerProcess) -> None:
    secret = "unmistakable prompt text"
    body = {"prompt": secret, "max_tokens": 30}
    assert get(keyed, "/v1/completions", "ann-secret", method="POST", json=body).status_code == 200
    log = keyed.wait_log("key=ann outcome=finished prompt=24")
    assert secret not in log and "ann-secret" not in log
