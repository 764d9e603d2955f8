"""Clients that leave: while queued, in prefill, at the first token, mid-stream, at the end."""

from __future__ import annotations

import random
import threading
import time
from types import TracebackType
from typing import Any, ClassVar

from tests.kits.server import ServerProcess
from tests.kits.wire import Wire, request_bytes

PATH = "/v1/completions"
PHASES = ("queued", "in prefill", "first token", "mid-stream", "after the last token")
TOKENS = range(4, 4000)


def fields_for(phase: str, rng: random.Random) -> dict[str, Any]:
    """A body that nobody has sent before and that reaches the phase."""
    length = 1800 if phase == "in prefill" else 40
    return {
        "prompt": [rng.choice(TOKENS) for _ in range(length)],
        "max_tokens": 4 if phase == PHASES[-1] else 200,
        "stream": rng.random() < 0.7 or phase not in PHASES[:2],
        "ignore_eos": True,
        "seed": rng.randrange(1000),
    }


def fill_pages(server: ServerProcess, rng: random.Random) -> None:
    """Prompts until nearly every KV page has been touched, and with it become memory."""
    with server.http() as http:
        while True:
            engine = server.info()["engine"]
            if engine and engine["pages_cached"] > 0.95 * engine["num_pages"]:
                return
            body = fields_for("in prefill", rng) | {"max_tokens": 1, "stream": False}
            http.post(PATH, json=body).raise_for_status()


def leave_together(server: ServerProcess, phase: str, count: int, rng: random.Random) -> None:
    """``count`` clients reach the phase and leave at once, by FIN or by RST."""
    before = server.info()["outcomes"]["accepted"]
    wires = []
    for _ in range(count):
        wire = Wire(server.port)
        wires.append(wire.send(request_bytes(PATH, fields_for(phase, rng))))
    if phase in PHASES[:2]:
        deadline = time.monotonic() + 10
        while server.info()["outcomes"]["accepted"] < before + count:
            assert time.monotonic() < deadline, f"{phase}: not all came in"
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.15))
    else:
        events = {PHASES[2]: 1, PHASES[3]: rng.randint(5, 30)}.get(phase)
        for wire in wires:
            if events is None:
                wire.until(b'"finish_reason":"length"')
            else:
                wire.until(b"data: ", events)
    for wire in wires:
        wire.leave(reset=rng.random() < 0.5)


class Neighbours:
    """Requests that go on beside all this, each with an answer known from before.

    Args:
        server: it has to be the bundled model's.
        count: how many at the same time.
    """

    BODY: ClassVar[dict[str, Any]] = {
        "prompt": "It was the best of times,", "max_tokens": 150, "seed": 3, "ignore_eos": True,
    }  # fmt: skip

    def __init__(self, server: ServerProcess, count: int) -> None:
        self._server = server
        self._expected = self._ask()
        self._stop = threading.Event()
        self.done = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> Neighbours:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> str:
        with self._server.http() as http:
            reply = http.post(PATH, json=self.BODY, timeout=60).raise_for_status()
        return str(reply.json()["choices"][0]["text"])

    def _work(self) -> None:
        while not self._stop.is_set():
            text = self._ask()
            self.done += 1
            if text != self._expected:
                self.wrong.append(text)
