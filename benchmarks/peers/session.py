"""The benchmark's end of `benchmarks.peers.protocol`: one contender's process."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.protocol import Job
from tools.peers.places import quiet_environment

ROOT = Path(__file__).parents[2]


class PeerError(Exception):
    """The contender ended, or answered nonsense; holds the end of what it wrote."""


class PatienceError(Exception):
    """The contender did not answer within its limit; it was ended."""


class UnableError(Exception):
    """The contender has no way to do what was asked."""


class Session:
    """A started contender.

    Args:
        command: interpreter and ``-m module``.
        job: what it is to load.
        limit_s: seconds it may take to load.

    Raises:
        PeerError, PatienceError, UnableError: it did not come up.
    """

    def __init__(self, command: Sequence[str | Path], job: Job, *, limit_s: float) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        environment = quiet_environment() | {"OMP_NUM_THREADS": str(job.threads)}
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # so that it and its children can be ended together
        )
        try:
            self._ask(json.dumps(asdict(job)), limit_s)
        except BaseException:
            self.close()
            raise

    def measure(self, task: str, *, limit_s: float) -> Any:
        """One task's figure.

        Raises:
            UnableError: the contender cannot do this one; others may go.
            PeerError, PatienceError: it is over with this session.
        """
        return self._ask(task, limit_s)["value"]

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, line: str, limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        answer: dict[str, Any] = json.loads(self._read_line(limit_s))
        if "unable" in answer:
            raise UnableError(answer["unable"])
        return answer

    def _read_line(self, limit_s: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        end = time.monotonic() + limit_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise PatienceError(f"not done in {limit_s:.0f} s")
                piece = os.read(fd, 1 << 16)
                if not piece:
                    raise PeerError(self._last_words())
                line += piece
        return line

    def _last_words(self) -> str:
        self._process.wait(timeout=10)
        self._log.seek(0)
        words = self._log.read().strip()[-1500:]
        return f"ended with code {self._process.returncode}: {words}"
