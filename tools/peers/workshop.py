"""Runs a recipe's commands: says what it does, keeps the output in a log, remembers steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class StepError(Exception):
    """A command of a recipe failed; the message says where its output is."""


class Workshop:
    """One folder being filled.

    A step that succeeded leaves a stamp holding its command line, and is skipped as long as
    that line stays the same: a build that was interrupted goes on where it stopped.

    Args:
        folder: where the recipe works; made if it is missing.
        name: what to call it in messages.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)

    def step(
        self,
        label: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        always: bool = False,
    ) -> None:
        """Run a command, once.

        Args:
            label: what it does, for people; unique within the folder.
            command: program and arguments; run in the folder, at low priority.
            env: its environment; this process's by default.
            always: run it again although it succeeded before (it knows what to skip).

        Raises:
            StepError: it failed.
        """
        line = " ".join(map(str, command))
        stamp = self.folder / f".step-{label.replace(' ', '-')}"
        if not always and stamp.exists() and stamp.read_text() == line:
            return
        self.say(f"{label} ...")
        began = time.perf_counter()
        with self.log.open("a") as log:
            log.write(f"$ {line}\n")
            log.flush()
            code = self._run([str(part) for part in command], log.fileno(), env)
        if code != 0:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise StepError(f"{label}: exit code {code}, see {self.log}; its last lines:\n{last}")
        stamp.write_text(line)
        self.say(f"{label}: {time.perf_counter() - began:.0f} s")

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        print(f"  {self.name}: {text}", file=sys.stderr, flush=True)

    def _run(self, command: list[str], log: int, env: Mapping[str, str] | None) -> int:
        if shutil.which(command[0]) is None:
            raise StepError(f"{command[0]} is needed and not installed; install it first")
        done = subprocess.run(
            ["nice", *command],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=None if env is None else dict(env),
            check=False,
        )
        return done.returncode
