"""Write docs/reference/ from the source: settings, errors and verbs.

``--check`` writes nothing and fails when a page is not current; the tests call it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coppice import errors
from coppice.cli.rooms import ROOMS
from coppice.errors import CoppiceError
from coppice.settings import FILE_VARIABLE, RoomConfig, Setting, settings_of

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
SOURCES = FOLDER.parent.parent / "src" / "coppice"
HEAD = "<!-- Written by tools/gen_reference.py from the source; edit there, then: make docs -->\n\n"


def settings_page() -> str:
    """Every setting: flag, variable, key, type, default and what it does."""
    lines = [
        "# Settings\n",
        "Each setting can be given four ways. The first that names it decides:\n",
        "1. the flag, as in `coppice serve --port 9000`;",
        "2. the variable, as in `COPPICE_PORT=9000`;",
        f"3. the YAML file named by `--config` or `{FILE_VARIABLE}`, where each room is a section;",
        "4. the default.\n",
        "A name that no room declares is an error that offers the nearest match.",
        "`coppice doctor` prints every value with its origin.",
        "A list is a repeated flag, a comma-separated variable, or a YAML list.",
        "`none` is written as the word.\n",
        "```yaml\nengine:\n  model: bundled\n  kv_cache_mib: 512\nserver:\n  port: 9000\n```\n",
    ]
    for room in ROOMS:
        lines += [f"## {room.ROOM}\n", _summary(room) + "\n"]
        lines += [
            "| flag | variable | type | default | what it does |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(item) for item in settings_of(room)]
        lines.append("")
    return HEAD + "\n".join(lines)


def _row(item: Setting) -> str:
    kind = item.type_name.replace("|", "\\|")
    bounds = ""
    if item.minimum is not None and item.maximum is not None:
        bounds = f" ({_number(item.minimum)} to {_number(item.maximum)})"
    elif item.minimum is not None:
        bounds = f" (at least {_number(item.minimum)})"
    flag = f"`{item.flag}`"
    if item.kind is bool:
        flag += f", `--no-{item.flag.removeprefix('--')}`"
    secret = " Never printed." if item.secret else ""
    sentence = item.sentence.replace("|", "\\|")
    return (
        f"| {flag} | `{item.variable}` | {kind}{bounds} | `{item.show(item.default)}` "
        f"| {sentence}{secret} |"
    )


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def errors_page() -> str:
    """Every error class: code, HTTP status, exit code and meaning."""
    lines = [
        "# Errors\n",
        "Every error Coppice raises on purpose is a `CoppiceError` with a stable code, one",
        "sentence that says what to do, and the field or setting at fault where there is one.",
        "Over HTTP the code is `error.code`; on the command line it stands in brackets, and",
        "the exit code is the class's. Some have a narrower code, listed below the classes.\n",
        "| code | class | family | HTTP status | exit code | meaning |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind in error_classes():
        mro = kind.__mro__
        family = mro[max(0, mro.index(CoppiceError) - 1)].__name__
        lines.append(
            f'| <a id="{kind.code}"></a>`{kind.code}` | `{kind.__name__}` | {family} '
            f"| {kind.status} | {kind.exit_code} | {_summary(kind)} |"
        )
    lines += [
        "\n## Narrower codes\n",
        "| code | class | HTTP status | what is said |",
        "| --- | --- | --- | --- |",
        *sorted(set(narrower_codes())),
    ]
    return HEAD + "\n".join(lines) + "\n"


def narrower_codes() -> Iterator[str]:
    """A row for each place that raises an error with a code of its own."""
    for path in SOURCES.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            kind = vars(errors).get(ast.unparse(call.func))
            given = {word.arg: word.value for word in call.keywords}
            code, status = given.get("code"), given.get("status")
            if not (inspect.isclass(kind) and issubclass(kind, CoppiceError)):
                continue
            if isinstance(code, ast.Constant):
                said = " ".join(map(_text, _sentences(call.args[0])))
                shown = status.value if isinstance(status, ast.Constant) else kind.status
                yield f"| `{code.value!s}` | `{kind.__name__}` | {shown!s} | {said} |"


def _sentences(message: ast.expr) -> list[ast.expr]:
    """The message, or both of its forms where a condition chooses."""
    return [message.body, message.orelse] if isinstance(message, ast.IfExp) else [message]


def _text(message: ast.expr) -> str:
    """A message as written, with dots where something is filled in."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)


def error_classes() -> Iterator[type[CoppiceError]]:
    """The classes of `coppice.errors`, in the order they are written."""
    for value in vars(errors).values():
        if inspect.isclass(value) and issubclass(value, CoppiceError):
            yield value


def commands_page() -> str:
    """Every verb with its own flags; settings are on their own page."""
    import typer

    from coppice.cli.app import app

    setting_names = {item.name for room in ROOMS for item in settings_of(room)}
    lines = ["# Commands\n", "Flags made from settings are listed in [settings](settings.md).\n"]
    for name, command in _leaves(typer.main.get_command(app), "coppice"):
        lines += [f"## `{name}`\n", inspect.cleandoc(command.help or "").replace("\b", "") + "\n"]
        for parameter in command.params:
            if parameter.name in setting_names or parameter.name in ("help", "config", "debug"):
                continue
            is_option = parameter.param_type_name == "option"
            names = parameter.opts if is_option else [parameter.metavar or parameter.name.upper()]
            shown = ", ".join(f"`{text}`" for text in names)
            lines.append(f"- {shown}: {parameter.help}")
        rooms = [text for room in ROOMS if (text := _taken(command, room))]
        lines.append(f"- settings of: {', '.join(rooms)}; `--config FILE`; `--debug`\n")
    return HEAD + "\n".join(lines)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    nested = getattr(command, "commands", None)
    if nested is None:
        yield name, command
        return
    for verb, child in nested.items():
        yield from _leaves(child, f"{name} {verb}")


def _taken(command: Any, room: type[RoomConfig]) -> str:
    """The room's name, the one flag taken from it, or nothing."""
    names = {parameter.name for parameter in command.params}
    taken = [item for item in settings_of(room) if item.name in names]
    return f"{room.ROOM} (only `{taken[0].flag}`)" if len(taken) == 1 else room.ROOM * bool(taken)


def _summary(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


PAGES = {"settings.md": settings_page, "errors.md": errors_page, "commands.md": commands_page}


def main() -> int:
    """Write the pages, or with ``--check`` name those that are not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    if args.check and stale:
        print(f"Not current: {', '.join(stale)}; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
