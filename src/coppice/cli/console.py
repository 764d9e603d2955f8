"""What goes to which stream: answers to stdout, everything about them to stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


T = TypeVar("T")


@cache
def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False)


@cache
def err() -> Console:
    """The console for progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_error(error: CoppiceError) -> None:
    """Print one red line: the sentence that says what to do, and the stable code."""
    from rich.text import Text

    line = Text("error: ", style="bold red")
    line.append(error.message, style="red")
    line.append(f" [{error.code}]", style="dim")
    err().print(line, soft_wrap=True)


def print_note(sentence: str) -> None:
    """Print one dim line beside an answer."""
    from rich.text import Text

    err().print(Text(sentence, style="dim"), soft_wrap=True)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_answer(text: str) -> None:
    """Write a model's text to stdout at once, unchanged unless stdout is a terminal.

    A terminal obeys escape sequences, and a model's text comes from outside: control
    characters other than tab and newline are shown as ``\N{REPLACEMENT CHARACTER}`` there.
    """
    if sys.stdout.isatty():
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def track(items: Iterable[T], *, total: int, label: str = "Answering") -> Iterator[T]:
    """Pass items through while a bar on stderr shows how many have come."""
    with _bar() as progress:
        yield from progress.track(items, total=total, description=label)


@contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling what this yields with (done, total)."""
    with _bar() as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err(), transient=True)
