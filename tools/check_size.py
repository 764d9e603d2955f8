"""Keep files, functions, signatures and class trees small enough to read.

Stops (exit 1): a file over 500 lines, a function over 80, more than 8 parameters, more than
5 of them positional, more than one base class that is no `Protocol` or `Generic`, a mixin,
a file called ``utils``. ``--aims`` also lists what is over the aims (250, 40, 5) without
failing.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset({".py", ".cpp", ".h", ".js", ".css", ".html"})
ABSTRACT = frozenset({"Protocol", "Generic", "ABC", "object"})

MANY_PARAMETERS = {
    # One fused pass over q and k: split in two, it would read them from memory twice.
    "rope_append": 10,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is too much."""

    file_lines: int
    function_lines: int
    parameters: int
    positional: int


STOP = Limits(file_lines=500, function_lines=80, parameters=8, positional=5)
AIM = Limits(file_lines=250, function_lines=40, parameters=5, positional=3)


def check_text(path: str, text: str, limits: Limits) -> Iterator[str]:
    """Yield one line per finding in a file of this content."""
    num_lines = text.count("\n") + (not text.endswith("\n") and bool(text))
    if num_lines > limits.file_lines:
        yield f"{path}: {num_lines} lines, at most {limits.file_lines}; split it by idea"
    if Path(path).stem in ("utils", "util", "helpers", "misc"):
        yield f"{path}: name the file after what it holds"
    if path.endswith(".py"):
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _check_function(path, node, limits)
            elif isinstance(node, ast.ClassDef):
                yield from _check_class(path, node)


def _check_function(
    path: str, node: ast.FunctionDef | ast.AsyncFunctionDef, limits: Limits
) -> Iterator[str]:
    place = f"{path}:{node.lineno}: {node.name}"
    body_start = node.body[0]
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:  # a long docstring is no long function
        length -= (body_start.end_lineno or 0) - body_start.lineno + 1
    if length > limits.function_lines:
        yield f"{place} has {length} lines, at most {limits.function_lines}"
    if path.startswith("tests/"):
        return  # a test's parameters are fixtures and cases, passed by name
    positional = [a.arg for a in node.args.posonlyargs + node.args.args]
    positional = [name for name in positional if name not in ("self", "cls")]
    total = len(positional) + len(node.args.kwonlyargs)
    most = max(limits.parameters, MANY_PARAMETERS.get(node.name, 0))
    if total > most:
        yield f"{place} has {total} parameters, at most {most}; group them in a dataclass"
    elif len(positional) > limits.positional and node.name not in MANY_PARAMETERS:
        yield f"{place} has {len(positional)} positional parameters, at most {limits.positional}"


def _check_class(path: str, node: ast.ClassDef) -> Iterator[str]:
    bases = [_last_name(base) for base in node.bases]
    if "Mixin" in node.name or any("Mixin" in base for base in bases):
        yield f"{path}:{node.lineno}: {node.name} uses a mixin; pass an object instead"
    concrete = [base for base in bases if base not in ABSTRACT]
    if len(concrete) > 1:
        yield f"{path}:{node.lineno}: {node.name} has {len(concrete)} base classes, at most 1"


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def tracked_files() -> list[Path]:
    """Source files git knows or would add; generated ones are ignored by git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [Path(line) for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file()]


def main() -> int:
    """Check every source file; the number of findings decides the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aims", action="store_true", help="list what is over the aims too")
    args = parser.parse_args()
    stops = 0
    for path in tracked_files():
        text = path.read_text(encoding="utf-8")
        for finding in check_text(str(path), text, STOP):
            print(finding)
            stops += 1
        if args.aims:
            for finding in check_text(str(path), text, AIM):
                print("aim:", finding)
    print(f"check_size: {stops} over the limit" if stops else "check_size: ok")
    return 1 if stops else 0


if __name__ == "__main__":
    sys.exit(main())
