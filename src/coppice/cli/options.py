"""Flags made from the fields of config dataclasses, so that none is written twice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer

from coppice.cli.rooms import ROOMS
from coppice.settings import (
    FILE_VARIABLE,
    Resolved,
    RoomConfig,
    Setting,
    load_sources,
    resolve,
    settings_of,
)
from coppice.settings.resolve import Sources

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=RoomConfig)


@dataclass(frozen=True, slots=True)
class Given:
    """What a person gave this command: its flags, the variables and the file."""

    flags: Mapping[str, object]
    sources: Sources

    def resolve(self, room: type[C], **fixed: object) -> Resolved[C]:
        """One room's config; ``fixed`` values stand in for flags that were not given."""
        names = {item.name for item in settings_of(room)}
        flags = {name: value for name, value in self.flags.items() if name in names}
        given = {name: value for name, value in flags.items() if value is not None}
        return resolve(room, {**fixed, **given}, self.sources)


def with_settings(
    *rooms: type[RoomConfig], only: Collection[str] = ()
) -> Callable[[Callable[Concatenate[Given, P], R]], Callable[P, R]]:
    """Give a command one flag for each setting of ``rooms``, ``--config`` and ``--debug``.

    Args:
        rooms: whose settings the command takes.
        only: take just these fields, when not empty.
    """

    def decorate(command: Callable[Concatenate[Given, P], R]) -> Callable[P, R]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        # A command's own flag hides a setting of that name: `run --seed` is the answer's seed.
        taken = {parameter.name for parameter in own}
        wanted = set(only) - taken
        items = [
            item
            for room in rooms
            for item in settings_of(room)
            if item.name not in taken and (not only or item.name in wanted)
        ]

        @functools.wraps(command)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            config = kwargs.pop("config")
            kwargs.pop("debug")
            values = {item.name: kwargs.pop(item.name) for item in items}
            flags = {name: None if value == [] else value for name, value in values.items()}
            sources = load_sources(ROOMS, config=config if isinstance(config, Path) else None)
            return command(Given(flags, sources), *args, **kwargs)

        extra = [*_common(), *(_parameter(item) for item in items)]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + extra
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _common() -> list[inspect.Parameter]:
    config = typer.Option(
        "--config", metavar="FILE", help=f"YAML file of settings (or {FILE_VARIABLE})."
    )
    debug = typer.Option("--debug", help="Show the traceback of an error.")
    return [
        _keyword("config", Path | None, config, None),
        _keyword("debug", bool, debug, False),
    ]


def _parameter(item: Setting) -> inspect.Parameter:
    """One setting as a Typer option; the value stays text and is read by the setting."""
    panel = f"{item.room.capitalize()} settings"
    text = f"{item.sentence} (default {item.show(item.default)}; {item.variable})"
    if item.kind is bool:
        names = f"{item.flag}/--no-{item.flag.removeprefix('--')}"
        option = typer.Option(names, help=text, show_default=False, rich_help_panel=panel)
        return _keyword(item.name, bool | None, option, None)
    kind: Any = list[str] | None if item.kind is tuple else str | None  # lists: repeat the flag
    option = typer.Option(
        item.flag,
        help=text,
        metavar="|".join(item.choices) or item.type_name.split(" or ")[0].upper(),
        autocompletion=_completer(item.choices),
        show_default=False,
        rich_help_panel=panel,
    )
    return _keyword(item.name, kind, option, None)


def _completer(choices: tuple[str, ...]) -> Callable[[str], list[str]] | None:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete if choices else None


def _keyword(name: str, kind: Any, option: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )
