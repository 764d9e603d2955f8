"""Checks of trouble: overload, signals, a process that dies or stands still."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.scorecard.answers import COMPLETE, SAMPLED, streamed, text
from benchmarks.scorecard.check import check, expect
from benchmarks.scorecard.subjects import Running

STREAM: dict[str, Any] = SAMPLED | {"max_tokens": 600, "ignore_eos": True}


class Background:
    """A stream read beside what the check does."""

    def __init__(self, server: Running, fields: dict[str, Any]) -> None:
        self.text: str | None = None
        self.why = "it did not end"
        self._server, self._fields = server, fields
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.text = streamed(self._server, COMPLETE, **self._fields)
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            self.why = f"the stream broke off ({type(error).__name__})"

    def result(self, timeout_s: float = 60.0) -> str:
        """Its text.

        Raises:
            AssertionError: it broke off.
        """
        self._thread.join(timeout_s)
        expect(self.text is not None, self.why)
        return self.text or ""


@check(
    "trouble", "400 requests at once: each ends in an answer or a refusal within 60 s", fresh=True
)
def _burst(server: Running) -> None:
    def one(number: int) -> int:
        try:
            reply = server.post(COMPLETE, 60.0, prompt=f"a {number}", max_tokens=32, seed=number)
            return reply.status_code
        except httpx.HTTPError:
            return 0

    with ThreadPoolExecutor(400) as pool:
        statuses = Counter(pool.map(one, range(400)))
    expect(set(statuses) <= {200, 429, 503}, f"statuses {dict(statuses)}")
    expect(server.works(), "no answer after it")


@check("trouble", "work without bound is refused with a time to come back", fresh=True)
def _overload(server: Running) -> None:
    fields = {"prompt": "a " * 900, "max_tokens": 800, "ignore_eos": True, "stream": True}
    seen: list[httpx.Response] = []

    def one(_: int) -> None:
        try:
            with server.client(4.0) as http, http.stream("POST", COMPLETE, json=fields) as reply:
                seen.append(reply)
                next(reply.iter_bytes(), None)
                time.sleep(3.0)
        except httpx.HTTPError:
            pass

    with ThreadPoolExecutor(400) as pool:
        list(pool.map(one, range(400)))
    turned_away = [reply for reply in seen if reply.status_code in (429, 503)]
    expect(bool(turned_away), "400 long answers are all taken in")
    expect(all("retry-after" in r.headers for r in turned_away), "a refusal without Retry-After")


@check("trouble", "on SIGTERM what runs is finished", fresh=True)
def _drain(server: Running) -> None:
    expected = streamed(server, COMPLETE, **STREAM)
    running = Background(server, STREAM)
    time.sleep(0.3)
    server.terminate()
    expect(running.result() == expected, "another text than before")


@check(
    "trouble",
    "on SIGTERM it says that it is no longer ready, and what comes is refused",
    fresh=True,
)
def _draining(server: Running) -> None:
    Background(server, STREAM | {"max_tokens": 1500})
    time.sleep(0.3)
    server.terminate()
    time.sleep(0.3)
    expect(server.health() == 503, f"/health says {server.health()} while it drains")


@check("trouble", "on SIGTERM it exits with 0", fresh=True)
def _exit(server: Running) -> None:
    server.terminate()
    status = server.process.wait(30)
    expect(status == 0, f"exit status {status}")


@check(
    "trouble", "the process with the model is killed: a stream goes on with its tokens", fresh=True
)
def _killed(server: Running) -> None:
    expected = streamed(server, COMPLETE, **STREAM)
    running = Background(server, STREAM)
    time.sleep(0.3)
    server.model_process().kill()
    expect(running.result() == expected, "another text than before")


@check("trouble", "the process with the model is killed: it is back within 20 s", fresh=True)
def _back(server: Running) -> None:
    expected = text(server, **SAMPLED)
    server.model_process().kill()
    time.sleep(0.5)
    expect(server.wait_healthy(20), "not healthy after 20 s")
    expect(text(server, **SAMPLED) == expected, "another text than before")


@check("trouble", "the process with the model stands still: health says so", fresh=True)
def _stopped(server: Running) -> None:
    process = server.model_process()
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(10.0)
        expect(server.health() == 503, f"/health says {server.health() or 'nothing'}")
    finally:
        process.send_signal(signal.SIGCONT)
    expect(server.wait_healthy(20) and server.works(), "no answer when it goes on")
