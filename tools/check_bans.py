"""Refuse what this project never does, by reading its syntax trees.

Each ban names what is forbidden, where it is allowed after all, and why. Imports inside
functions count too. Runs over ``src/`` only; tests may use ``transformers`` and the rest.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path("src/coppice")


@dataclass(frozen=True, slots=True)
class Ban:
    """One rule: names (modules or dotted attributes) and the rooms that may use them."""

    names: tuple[str, ...]
    why: str
    allowed_in: tuple[str, ...] = ()


BANS = (
    Ban(
        ("pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
        "loading one can run code; use msgpack or safetensors",
    ),
    Ban(
        ("torch.load", "torch.save", "torch.jit.load", "torch.serialization", "numpy.load"),
        "it is pickle; use safetensors",
    ),
    Ban(
        ("eval", "exec", "__import__", "runpy", "yaml.unsafe_load", "yaml.Loader"),
        "text from outside must never become code; parse it",
    ),
    Ban(("os.system", "os.popen"), "it goes through a shell; use subprocess with a list"),
    Ban(
        ("os.environ", "os.getenv", "os.environb", "os.putenv"),
        "settings come from config fields",
        allowed_in=("settings",),
    ),
    Ban(("transformers",), "it is the reference for parity in tests, not a part of the runtime"),
    Ban(
        ("asyncio", "anyio"),
        "the engine is one thread with an inbox and an outbox",
        allowed_in=("server",),
    ),
    Ban(
        ("requests", "httpx", "aiohttp", "urllib.request"),
        "only the command line talks to other machines, and huggingface_hub for models",
        allowed_in=("cli",),
    ),
    Ban(("torch.compile",), "it costs users minutes at start"),
)
CODE_MAKERS = frozenset({"eval", "exec", "__import__"})
"""Built-in names that are forbidden even where they are but passed on."""


def check_text(path: str, text: str) -> Iterator[str]:
    """Yield one line per forbidden name used in a file of this content."""
    room = Path(path).relative_to(SOURCE).parts[0].removesuffix(".py")
    bans = [ban for ban in BANS if room not in ban.allowed_in]
    tree = ast.parse(text, path)
    aliases = dict(_aliases(tree))
    for node in ast.walk(tree):
        for name in (name.removeprefix("builtins.") for name in _names(node, aliases)):
            for ban in bans:
                if any(name == banned or name.startswith(banned + ".") for banned in ban.names):
                    line = getattr(node, "lineno", 0)
                    yield f"{path}:{line}: {name} is not used here: {ban.why}"


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names of what is imported: ``import torch as t`` makes ``t`` mean ``torch``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname, alias.name)
                    if alias.asname
                    else (
                        alias.name.split(".")[0],
                        alias.name.split(".")[0],
                    )
                )


def _names(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    """Dotted names a node imports, or reads from an imported module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute):
        dotted = _dotted(node)
        root, _, rest = dotted.partition(".")
        if root in aliases:
            yield f"{aliases[root]}.{rest}"
    elif isinstance(node, ast.Name) and node.id in CODE_MAKERS:
        yield node.id
    elif isinstance(node, ast.Call) and _dotted(node.func).endswith("import_module"):
        yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def main() -> int:
    """Check every module of the package."""
    findings = []
    for path in sorted(SOURCE.rglob("*.py")):
        # An attribute chain is several nodes; one report per line and name is enough.
        findings += dict.fromkeys(check_text(str(path), path.read_text(encoding="utf-8")))
    print(*findings, sep="\n", end="\n" if findings else "")
    print(f"check_bans: {len(findings)} found" if findings else "check_bans: ok")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
