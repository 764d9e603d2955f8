"""An engine that dies is a pause: what the front end does, over the scripted engine."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.kits.server import ServerProcess

BODY: dict[str, Any] = {"prompt": "abcdefg", "max_tokens": 300, "ignore_eos": True}


def text_of(server: ServerProcess, **fields: Any) -> str:
    with server.http() as http:
        reply = http.post("/v1/completions", json=BODY | fields, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def kill_engine(server: ServerProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal; of a deadly one, return when the server has noticed the death."""
    pid = server.info()["engine_pid"]
    os.kill(pid, number)
    if number in (signal.SIGKILL, signal.SIGABRT):
        server.wait_until(lambda info: info["engine_pid"] != pid)


def wait_ready(server: ServerProcess, timeout_s: float = 20.0) -> float:
    began = time.monotonic()
    with server.http() as http:
        while http.get("/health/ready").status_code != 200:
            assert time.monotonic() - began < timeout_s
            time.sleep(0.02)
    return time.monotonic() - began


def test_a_killed_engine_is_a_pause_for_its_requests(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.005, "load_s": 1.0}) as server:
        expected = text_of(server)
        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(text_of, server, n=n, stream=False) for n in (1, 1, 1, 2, 3, 1)]
            server.wait_running(1 + 1 + 1 + 2 + 3 + 1)
            kill_engine(server)
            with server.http() as http:
                ready = http.get("/health/ready")
                assert (ready.status_code, ready.json()) == (503, {"status": "restarting"})
                assert http.get("/health/live").status_code == 200
                refused = http.post("/v1/completions", json=BODY)
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "engine_restarting"
            wait_ready(server)
            kill_engine(server)
            assert [run.result() for run in running] == [expected] * 6
        info = server.wait_idle()
        assert info["engine_restarts"] == 2 and info["requests_replayed"] >= 6
        assert info["outcomes"]["finished"] == 7 and info["outcomes"]["failed"] == 0


@pytest.mark.parametrize("seed", [pytest.param(667, marks=pytest.mark.slow), 669])
def test_a_request_the_engine_dies_of_is_poisoned_and_its_neighbours_go_on(
    fake_model: Path, seed: int
) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.01}) as server:
        expected = text_of(server)
        with ThreadPoolExecutor(3) as pool:
            neighbours = [pool.submit(text_of, server) for _ in range(3)]
            server.wait_running(3)
            with pytest.raises(openai.APIStatusError) as caught:
                server.client(max_retries=2).completions.create(
                    model="fake",
                    prompt="abcdefg",
                    seed=seed,
                    max_tokens=40,
                    extra_body={"ignore_eos": True},
                )
            assert (caught.value.status_code, caught.value.code) == (500, "poisoned")
            assert [run.result() for run in neighbours] == [expected] * 3
        info = server.wait_idle()
        assert info["engine_restarts"] == 3
        assert info["outcomes"]["failed"] == 1, "a client that retries must not be tempted"
        with server.http() as http:
            again = http.post("/v1/completions", json=BODY | {"seed": seed, "max_tokens": 40})
        assert again.json()["error"]["code"] == "poisoned"
        assert server.info()["engine_restarts"] == 3
        assert text_of(server) == expected


def test_innocent_suspects_pass_and_go_on(fake_model: Path) -> None:
    """SIGABRT is the engine's own doing: who was there twice runs alone, then with others."""
    with ServerProcess(fake_model, fake={"step_s": 0.01}) as server:
        expected = text_of(server)
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(text_of, server) for _ in range(4)]
            for _ in range(3):
                wait_ready(server)
                server.wait_running(4, tokens=10)
                kill_engine(server, signal.SIGABRT)
            assert [run.result() for run in running] == [expected] * 4
        assert "".join(server.log).count("runs alone") >= 4
        assert server.wait_idle()["outcomes"]["failed"] == 0


def test_cancels_and_deadlines_act_while_the_engine_is_away(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.01, "load_s": 2.0}) as server:
        with ThreadPoolExecutor(3) as pool, server.http(headers_more={"X-Request-Id": "c"}) as http:
            leaves = pool.submit(http.post, "/v1/completions", json=BODY | {"max_tokens": 1900})
            expires = pool.submit(text_of, server, max_tokens=1900, deadline_s=1.5)
            server.wait_running(2, tokens=2)
            kill_engine(server)
            assert http.post("/v1/requests/c/cancel").json()["cancelled"] == 1
            assert leaves.result().json()["choices"][0]["stop_reason"] == "cancelled"
            text = expires.result()
            assert text and len(text) < 1900
        info = server.wait_idle()
        assert info["outcomes"] | {"accepted": 2} == info["outcomes"]
        assert (info["outcomes"]["cancelled"], info["outcomes"]["expired"]) == (1, 1)


def test_an_engine_that_hangs_is_ended_and_its_requests_go_on(fake_model: Path) -> None:
    settings = {"engine_hang_s": 2.0}
    with ServerProcess(fake_model, fake={"step_s": 0.01}, server=settings) as server:
        expected = text_of(server)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(text_of, server)
            server.wait_running(1)
            kill_engine(server, signal.SIGSTOP)
            assert running.result() == expected
        assert server.wait_idle()["engine_restarts"] == 1


def test_an_engine_that_comes_back_with_other_weights_continues_nothing(fake_model: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.01, "new_weights": True}) as server:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                lambda: httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=30)
            )
            server.wait_running(1, tokens=1)
            kill_engine(server)
            reply = running.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
        assert "another model" in reply.json()["error"]["message"]


def test_streams_get_every_token_once_and_pings_in_the_pause(fake_model: Path) -> None:
    fake, settings = {"step_s": 0.005, "load_s": 1.0}, {"ping_s": 0.2}
    with ServerProcess(fake_model, fake=fake, server=settings) as server:
        lines: list[str] = []

        def read() -> None:
            body = BODY | {"stream": True, "logprobs": 1}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
                lines.extend(line for line in reply.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        server.wait_running(1, tokens=10)
        kill_engine(server)
        reader.join()
        assert lines[-1] == "data: [DONE]" and lines.count(": ping") >= 3
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        scores = [event["choices"][0]["logprobs"]["token_logprobs"] for event in events]
        assert sum(map(len, scores)) == 300
