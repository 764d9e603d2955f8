"""The servers that are asked, each behind the same few methods."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from tools.peers import places

KEY = "scorecard-key-0123456789"
START_S = 90.0


class Subject(Protocol):
    """How to start one server, with the bundled model and room for eight answers at once."""

    name: str

    def command(self, port: int, *, key: str | None) -> list[str]:
        """The program and its arguments."""
        ...

    def absent(self) -> str | None:
        """Why it cannot be asked, if it cannot."""
        ...


class Coppice:
    """``coppice serve`` as it is."""

    name = "coppice"

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `Subject`."""
        more = ["--api-key", key] if key else []
        return [sys.executable, "-m", "coppice", "serve", "bundled", "--port", str(port), *more]

    def absent(self) -> str | None:
        """See `Subject`."""
        return None


class LlamaCpp:
    """``llama-server`` with the same model as GGUF, as its README starts it."""

    name = "llama.cpp"

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `Subject`."""
        more = ["--api-key", key] if key else []
        program, model = str(places.llama_tool("llama-server")), str(places.gguf("bundled", "bf16"))
        sizes = ["-c", "16384", "-np", "8", "--jinja", "--alias", "bundled"]
        return [program, "-m", model, "--host", "127.0.0.1", "--port", str(port), *sizes, *more]

    def absent(self) -> str | None:
        """See `Subject`."""
        for path in (places.llama_tool("llama-server"), places.gguf("bundled", "bf16")):
            if not path.exists():
                return f"{path} is not there; run `make peers` and `python -m tools.peers --server`"
        return None


class VllmCpu:
    """vLLM's CPU build with the same checkpoint, eager, as its documentation starts it."""

    name = "vllm-cpu"
    SETTINGS = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1", "HF_HUB_OFFLINE=1")

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `Subject`."""
        more = ["--api-key", key] if key else []
        program = [str(places.python(self.name)), "-m", "vllm.entrypoints.openai.api_server"]
        model = ["--model", str(places.checkpoint("bundled")), "--served-model-name", "bundled"]
        sizes = ["--dtype", "bfloat16", "--max-model-len", "2048", "--enforce-eager"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        return ["env", *self.SETTINGS, *program, *model, *sizes, *where, *more]

    def absent(self) -> str | None:
        """See `Subject`."""
        if places.installed(self.name) is None or not places.checkpoint("bundled").exists():
            return "it is not installed; run `make peers`"
        return None


class NotStartedError(RuntimeError):
    """A server did not get healthy, so nothing can be said of it."""


@dataclass
class Running:
    """One started server.

    Attributes:
        key: what it asks of its clients, if anything.
        log: where its output goes.

    Raises:
        NotStartedError: on entering, where it does not get healthy in `START_S`.
    """

    subject: Subject
    key: str | None = None
    log: Path = Path("/dev/null")
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)

    def __enter__(self) -> Running:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.subject.command(self.port, key=self.key), stdout=out, stderr=out
            )
        if not self.wait_healthy(START_S):
            self.__exit__()
            raise NotStartedError(f"{self.subject.name} was not healthy after {START_S:g} s.")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Its processes, the first one last."""
        try:
            root = psutil.Process(self.process.pid)
            return [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            return []

    def model_process(self) -> psutil.Process:
        """The one that holds the model: the largest."""
        return max(self.family(), key=lambda process: process.memory_info().rss)

    def client(self, timeout_s: float = 60.0, *, key: str | None = None) -> httpx.Client:
        """An HTTP client with the server's key."""
        key = key or self.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=timeout_s
        )

    def post(self, path: str, timeout_s: float = 60.0, **fields: Any) -> httpx.Response:
        """Send a JSON body."""
        with self.client(timeout_s) as http:
            return http.post(path, json=fields)

    def health(self, timeout_s: float = 2.0) -> int:
        """Status of ``/health``; 0 without an answer."""
        try:
            with self.client(timeout_s) as http:
                return http.get("/health").status_code
        except httpx.HTTPError:
            return 0

    def wait_healthy(self, timeout_s: float) -> bool:
        """Whether ``/health`` says 200 within the time."""
        deadline = time.monotonic() + timeout_s
        while self.health() != 200:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def works(self) -> bool:
        """Whether it still answers the simplest request."""
        try:
            reply = self.post("/v1/completions", 15.0, prompt="a", max_tokens=1)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    def terminate(self) -> None:
        """SIGTERM to the first process."""
        self.process.send_signal(signal.SIGTERM)

    def raw(self, data: bytes, *, timeout_s: float) -> bytes | None:
        """Send bytes as they are; what came back until it closed, ``None`` if it did not."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as raw:
            received = b""
            try:
                raw.sendall(data)
                while piece := raw.recv(1 << 16):
                    received += piece
            except (BrokenPipeError, ConnectionResetError):
                return received
            except TimeoutError:
                return received or None
            return received
