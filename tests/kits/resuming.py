"""A client that takes its stream up again, whatever happens to the server meanwhile.

It keeps every event it was sent, by the place each came with, so that a test can tell a
token sent twice, and one never sent.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from tests.kits.load import Answer, Body, Choice, Crew, Savings, with_usage


@dataclass
class Reading:
    """One answer, gathered over any number of connections."""

    answer: Answer = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    place: str | None = None
    places: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    calls: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: bool = False
    cuts: int = 0
    drains: int = 0
    longest_pause_s: float = 0.0
    last_s: float = 0.0

    def take(self, lines: Iterator[str]) -> None:
        """Read one connection to its end, or until its server shuts down."""
        place = None
        for line in lines:
            if line.startswith("id: "):
                place = line[4:]
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                now = time.monotonic()
                if self.places:
                    self.longest_pause_s = max(self.longest_pause_s, now - self.last_s)
                self.last_s = now
                event = json.loads(line[6:])
                if event.get("error", {}).get("code") == "shutting_down":
                    self.drains += 1  # the [DONE] that follows is the server's, not the answer's
                    return
                self._event(event, place)

    def _event(self, event: dict[str, Any], place: str | None) -> None:
        if "error" in event:
            self.error = event["error"]
            return
        assert place is not None and place not in self.places, f"{place} came twice"
        self.places.append(place)
        self.place = place
        self.ids.add(event["id"])
        self.usage = event.get("usage") or self.usage
        for part in event["choices"]:
            self.answer.setdefault(part["index"], Choice()).add(part)
            for call in (part.get("delta") or {}).get("tool_calls") or ():
                if "id" in call:
                    self.calls.append(call["id"])


def read_through(
    connect: Callable[[], httpx.Client],
    body: Body,
    name: str,
    *,
    cut_after: Callable[[], int | None] = lambda: None,
    give_up_s: float = 120.0,
) -> Reading:
    """Ask for a resumable stream and follow it to its end over every cut.

    Args:
        connect: makes a client of the server as it is now.
        body: path and fields.
        name: the ``X-Request-Id`` it is sent with.
        cut_after: lines after which this client closes a connection itself.
        give_up_s: seconds after which it raises `TimeoutError`.
    """
    reading = Reading()
    asked = False
    give_up = time.monotonic() + give_up_s
    while not reading.done:
        if time.monotonic() > give_up:
            raise TimeoutError(f"{name}: {reading}")
        try:
            with connect() as http, _request(http, body, name, reading, asked) as reply:
                if reply.status_code == 200:
                    asked = True
                    lines = reply.iter_lines()
                    most = cut_after()
                    reading.take(lines if most is None else islice(lines, most))
                    if not reading.done:
                        reading.cuts += 1
                elif reply.status_code == 404 and not reading.places:
                    asked = False  # it had not been accepted
                else:
                    reply.read()
                    assert reply.status_code == 503, f"{reply.status_code} {reply.text}"
                    time.sleep(0.05)
        except httpx.TransportError:
            asked = True  # perhaps
            reading.cuts += 1
            time.sleep(0.05)
    return reading


def _request(
    http: httpx.Client, body: Body, name: str, reading: Reading, asked: bool
) -> AbstractContextManager[httpx.Response]:
    if not asked:
        headers = {"X-Resumable": "true", "X-Request-Id": name}
        return http.stream("POST", body[0], json=body[1] | {"stream": True}, headers=headers)
    path = f"/v1/requests/{name}/stream"
    if reading.place is None:
        return http.stream("GET", path)
    if len(reading.places) % 2:
        return http.stream("GET", path, params={"after": reading.place})
    return http.stream("GET", path, headers={"Last-Event-ID": reading.place})


class Readers(Crew):
    """Closed-loop clients with resumable streams, over any number of server processes.

    Args:
        url: of each server process.
        bodies: what is asked for.
        expected: by index in ``bodies``, the undisturbed answer.
        size: clients.
        seed: which of them asks what, and where it cuts its connection.
        give_up_s: how long an answer may take over all cuts.
    """

    def __init__(
        self,
        url: str,
        bodies: Sequence[Body],
        expected: list[Answer],
        *,
        size: int,
        seed: int,
        give_up_s: float = 60.0,
    ) -> None:
        super().__init__(size, seed)
        self._give_up_s = give_up_s
        self._url, self._bodies, self._expected = url, bodies, expected
        self.wrong: list[str] = []
        self.saved = Savings()
        self.done = self.cuts = self.drains = 0

    def _connect(self) -> httpx.Client:
        return httpx.Client(base_url=self._url, timeout=30.0, verify=False)

    def _work(self, worker: int, rng: random.Random) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            index = rng.randrange(len(self._bodies))
            path, fields = body = self._bodies[index]
            cut_after = rng.choice((lambda: None, lambda: rng.randrange(1, 60)))
            try:
                reading = read_through(
                    self._connect, (path, with_usage(fields)), f"r-{worker}-{number}",
                    cut_after=cut_after, give_up_s=self._give_up_s,
                )  # fmt: skip
            except Exception as error:
                self.wrong.append(f"{body}: {error!r}")
                return
            self.done += 1
            self.cuts += reading.cuts
            self.drains += reading.drains
            if reading.answer != self._expected[index] or len(reading.ids) != 1:
                self.wrong.append(f"{body}: {reading} != {self._expected[index]}")
            if reading.error is not None or len(set(reading.calls)) != len(reading.calls):
                self.wrong.append(f"{body}: {reading.error} {reading.calls}")
            if reading.usage is None:
                self.wrong.append(f"{body}: the usage did not come")
            else:
                self.saved.add(reading.usage)


def free_port() -> int:
    """One that nobody listens on, for a server that is started again.

    Below those that the system hands out itself: one of its own choice could be the near end of
    somebody's connection while no server holds it, even of a client's that tries to reach it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
