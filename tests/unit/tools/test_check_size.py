"""The size checker stops at its limits and not before."""

from __future__ import annotations

import pytest

from tools.check_size import STOP, check_text


def function(lines: int, docstring: int = 0) -> str:
    doc = '    """' + "\n".join(["x"] * docstring) + '"""\n' if docstring else ""
    return "def f():\n" + doc + "    a = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a = 1\n" * 501, "501 lines"),
        (function(81), "has 81 lines"),
        ("def f(a, b, c, d, e, g): ...\n", "6 positional"),
        ("def f(a, *, b, c, d, e, g, h, i, j): ...\n", "9 parameters"),
        ("class A(B, C): ...\n", "2 base classes"),
        ("class AMixin: ...\n", "mixin"),
        ("class A(LogMixin): ...\n", "mixin"),
    ],
)
def test_over_the_stop(text: str, finding: str) -> None:
    (found,) = check_text("src/coppice/engine/a.py", text, STOP)
    assert finding in found


@pytest.mark.parametrize(
    "text",
    [
        "a = 1\n" * 500,
        function(80),
        function(80, docstring=60),
        "class A:\n    def f(self, a, b, c, *, d, e, g, h, i): ...\n",
        "class A(Base, Generic[T]): ...\n",
        "",
    ],
)
def test_within_the_stop(text: str) -> None:
    assert not list(check_text("src/coppice/engine/a.py", text, STOP))


def test_a_file_named_utils_is_refused() -> None:
    assert list(check_text("src/coppice/engine/utils.py", "", STOP))
    assert list(check_text("src/x.cpp", "int a;\n" * 501, STOP))
