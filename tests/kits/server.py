"""A real server process on a free port of this machine.

    with ServerProcess(model=folder, fake={}) as server:
        client = server.client()

Takes any engine configuration; ``fake`` puts the scripted engine of `tests.kits.fake_engine`
in the engine's place.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.kits.fake_model import EOS, VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
_NO_TLS = ssl.create_default_context()  # made once: it costs more than a request
READY = re.compile(r" at (http://\S+) ")
DRAINED_S = 5.0
"""For what a process that has ended wrote; longer only where another holds its pipes."""


class ServerProcess:
    """One server.

    Args:
        model: what the engine loads (a folder with a tokenizer, for the fake one).
        engine: further engine settings.
        server: server settings; port 0 by default.
        fake: options of the fake engine (``step_s``, ``context_length``, ``fatal``), or
            ``None`` for the real one.
        program: a module that does what `tests.kits.serve_main` does, and more.
        cwd: the folder it is started in.
        start_timeout_s: how long it may take to be ready.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        engine: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        fake: dict[str, Any] | None = None,
        program: str = "tests.kits.serve_main",
        cwd: Path = ROOT,
        start_timeout_s: float = 60.0,
    ) -> None:
        settings = {"port": 0, "drain_announce_s": 0.0, "ping_s": 5.0} | (server or {})
        command = [
            sys.executable, "-P", "-m", program,
            "--server", json.dumps(settings),
            "--engine", json.dumps({"model": str(model)} | (engine or {})),
        ]  # fmt: skip
        if fake is not None:
            options = {"eos": EOS, "vocab_size": VOCAB_SIZE} | fake
            command += ["--fake", json.dumps(options)]
        more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join(str(ROOT / each) for each in ("src", "", *more))
        self.process = subprocess.Popen(
            command, cwd=cwd, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out: list[str] = []
        self.log: list[str] = []
        self.key = settings.get("api_key")
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read_out, self._read_log)
        ]
        for reader in self._readers:
            reader.start()
        self._start_timeout_s = start_timeout_s
        self.url = ""

    def __enter__(self) -> ServerProcess:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Wait for the line that says where it serves."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                self.process.kill()
                raise TimeoutError("not ready:\n" + "".join(self.log)) from None
            if line is None:
                raise RuntimeError("did not start:\n" + "".join(self.log))
            if found := READY.search(line):
                self.url = found[1]
                return

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM, then SIGKILL; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.exited(None)

    def exited(self, timeout_s: float | None) -> int:
        """Wait for its end; ``out`` and ``log`` are whole then. Returns the exit code."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(DRAINED_S)
        return code

    def client(self, **kwargs: Any) -> openai.OpenAI:
        """The official client, without retries."""
        defaults: dict[str, Any] = {
            "max_retries": 0,
            "timeout": 60.0,
            "http_client": httpx.Client(verify=_NO_TLS, timeout=60.0),
        }
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key or "none", **(defaults | kwargs)
        )

    def http(self, *, headers_more: dict[str, str] | None = None, **kwargs: Any) -> httpx.Client:
        """A plain client with the server's key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= headers_more or {}
        defaults: dict[str, Any] = {"timeout": 30.0, "verify": _NO_TLS}
        return httpx.Client(base_url=self.url, headers=headers, **(defaults | kwargs))

    def info(self) -> dict[str, Any]:
        """``/v1/coppice/info``."""
        with self.http() as http:
            made: dict[str, Any] = http.get("/v1/coppice/info").raise_for_status().json()
            return made

    def wait_idle(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Wait until no call is in flight and the engine runs nothing; returns the info."""

        def idle(info: dict[str, Any]) -> bool:
            stats = info["engine"] or {"running": 0, "waiting": 0}
            return not (info["outcomes"]["in_flight"] or stats["running"] or stats["waiting"])

        return self.wait_until(idle, timeout_s)

    def wait_running(self, count: int, *, tokens: int = 0, timeout_s: float = 20.0) -> None:
        """Wait until the engine runs so many sequences, and then for so many tokens of each.

        Of each: that is so with the fake engine, whose steps bring every sequence one.
        """
        info = self.wait_until(lambda i: i["engine"] and i["engine"]["running"] >= count, timeout_s)
        wanted = info["engine"]["generated_tokens"] + tokens * info["engine"]["running"]
        self.wait_until(lambda i: i["engine"]["generated_tokens"] >= wanted, timeout_s)

    def wait_until(
        self, what: Callable[[dict[str, Any]], object], timeout_s: float = 20.0
    ) -> dict[str, Any]:
        """Wait until something is true of the info; returns that.

        Raises:
            TimeoutError: it was not, in time.
        """
        deadline = time.monotonic() + timeout_s
        while not what(info := self.info()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so after {timeout_s:g} s: {info}")
            time.sleep(0.02)
        return info

    def wait_log(self, text: str, timeout_s: float = 5.0) -> str:
        """Wait until a live server has logged this text; returns the log."""
        deadline = time.monotonic() + timeout_s
        while text not in (log := "".join(self.log)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} not logged in {timeout_s:g} s:\n{log[-3000:]}")
            time.sleep(0.02)
        return log

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.out.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
