"""Sessions over HTTP: named by clients, scoped by tenant, ended by them or given up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coppice.server.keys import hash_key
from tests.kits.server import ServerProcess

CHAT, TEXT, END = "/v1/chat/completions", "/v1/completions", "/v1/sessions/end"
PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom, " * 6
KEYS = {"one": "key-of-tenant-one", "two": "key-of-tenant-two"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    entries = [{"name": n, "tenant": n, "sha256": hash_key(key)} for n, key in KEYS.items()]
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    with ServerProcess(
        "bundled", start_timeout_s=90, engine={"kv_cache_mib": 8, "order": "sessions"},
        server={"api_keys_file": str(path)},
    ) as made:  # fmt: skip
        made.key = KEYS["one"]
        yield made


def post(server: ServerProcess, path: str, tenant: str = "one", **body: Any) -> httpx.Response:
    with server.http(headers_more={"Authorization": f"Bearer {KEYS[tenant]}"}) as http:
        return http.post(path, json=body)


def turn(server: ServerProcess, tenant: str = "one", **body: Any) -> Any:
    fields = {"prompt": PROMPT, "max_tokens": 8, "seed": 5, "temperature": 0} | body
    reply = post(server, TEXT, tenant, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_for(server: ServerProcess, **wanted: int) -> None:
    def so(info: dict[str, Any]) -> bool:
        found = info["engine"]["sessions"] if info["engine"] else {}
        return all(found.get(name) == value for name, value in wanted.items())

    server.wait_until(so)


def end_all(server: ServerProcess) -> None:
    for tenant in KEYS:
        for name in ("a", "b"):
            assert post(server, END, tenant, session_id=name).status_code == 200
    wait_for(server, open=0, paused=0, kept_pages=0)


def test_a_session_is_paused_kept_and_ended_and_its_answers_are_the_same(
    server: ServerProcess,
) -> None:
    plain = turn(server)["choices"][0]["text"]
    named = turn(server, session_id="a", session_tool="look")
    assert named["choices"][0]["text"] == plain
    assert "warnings" not in named
    wait_for(server, open=1, paused=1)
    assert server.info()["engine"]["sessions"]["kept_pages"] > 0
    with server.http() as http:
        metrics = http.get("/metrics").text
    assert 'coppice_sessions{state="paused"} 1.0' in metrics
    again = turn(server, session_id="a", prompt=PROMPT + plain + " And then")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 64
    for _ in range(2):
        assert post(server, END, session_id="a").json() == {"session_id": "a"}
    wait_for(server, open=0, paused=0, kept_pages=0)


def test_a_session_belongs_to_its_tenant(server: ServerProcess) -> None:
    turn(server, "one", session_id="a")
    turn(server, "two", session_id="a")
    wait_for(server, open=2, paused=2)
    post(server, END, "two", session_id="a")
    wait_for(server, open=1, paused=1)
    post(server, END, "two", session_id="one\na")
    post(server, END, "two", session_id="never heard of")
    turn(server, "two", session_id="b")
    wait_for(server, open=2, paused=2)
    end_all(server)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_answer_calls_is_what_the_session_waits_for(
    server: ServerProcess, stream: bool
) -> None:
    tool = {"type": "function", "function": {"name": "greet", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
        "additionalProperties": False,
    }, "strict": True}}  # fmt: skip
    reply = post(
        server, CHAT, messages=[{"role": "user", "content": "Greet."}], tools=[tool], seed=3,
        tool_choice="required", parallel_tool_calls=False, max_tokens=250, session_id="a",
        stream=stream,
    )  # fmt: skip
    assert reply.status_code == 200 and "greet" in reply.text
    wait_for(server, open=1, paused=1)
    end_all(server)


def test_bad_names_are_refused_and_strange_ones_are_names(server: ServerProcess) -> None:
    for name in ("", "x" * 257, "a\nb", "\x00", 5, None, ["a"]):
        assert post(server, END, session_id=name).status_code == 400, name
    assert post(server, END).status_code == 400
    alone = post(server, TEXT, prompt="x", max_tokens=1, session_tool="look")
    assert alone.status_code == 400
    assert alone.json()["error"]["param"] == "session_tool"
    strange = ["../../etc/passwd", "x" * 256, "🙂\u202e", "' OR 1=1 --", "default"]
    for name in strange:
        turn(server, session_id=name, max_tokens=1)
    wait_for(server, open=len(strange), paused=len(strange))
    for name in strange:
        assert post(server, END, session_id=name).json() == {"session_id": name}
    wait_for(server, open=0, paused=0, kept_pages=0)
    assert server.info()["engine"]["pages_used"] == 0


def test_a_turn_goes_on_when_the_engine_dies(server: ServerProcess) -> None:
    fields = {
        "prompt": PROMPT, "max_tokens": 600, "seed": 5, "temperature": 0.8, "ignore_eos": True,
    }  # fmt: skip
    whole = turn(server, **fields)["choices"][0]["text"]
    turn(server, session_id="a")
    body = fields | {"stream": True, "session_id": "a"}
    text = ""
    with server.http() as http, http.stream("POST", TEXT, json=body, timeout=60.0) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            if not text:
                os.kill(server.info()["engine_pid"], signal.SIGKILL)
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == whole
    assert server.info()["engine_restarts"] == 1
    wait_for(server, open=1, paused=1)
    assert turn(server, session_id="a")["choices"]
    end_all(server)


def test_where_sessions_change_nothing_the_reply_says_so(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={}) as plain, plain.http() as http:
        body = {"prompt": "x", "max_tokens": 1, "session_id": "a"}
        (warning,) = http.post(TEXT, json=body).json()["warnings"]
        assert "--order sessions" in warning
        assert http.post(END, json={"session_id": "a"}).json()["warnings"] == [warning]
        del body["session_id"]
        assert "warnings" not in http.post(TEXT, json=body).json()
