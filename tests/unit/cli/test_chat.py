"""The conversation loop, driven through a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator

import pytest

from coppice.cli.chat import Messages, converse
from coppice.cli.console import write_answer
from coppice.errors import ContextOverflowError


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *, fail: bool = False) -> list[Messages]:
    turns: list[Messages] = []

    def ask(messages: Messages) -> Generator[str]:
        turns.append(list(messages))
        yield f"answer {len(turns)}"
        if fail:
            raise ContextOverflowError("Too long; type /reset.")

    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    converse(ask, len, [{"role": "system", "content": "be brief"}])
    return turns


def test_history_grows_and_reset_forgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = talk(monkeypatch, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n")
    system = {"role": "system", "content": "be brief"}
    assert turns == [
        [system, {"role": "user", "content": "one"}],
        [
            system,
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "answer 1"},
            {"role": "user", "content": "two"},
        ],
        [system, {"role": "user", "content": "three"}],
    ]
    captured = capsys.readouterr()
    assert captured.out == "answer 1\nanswer 2\nanswer 3\n"
    assert "tok/s" in captured.err


def test_through_a_pipe_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContextOverflowError):
        talk(monkeypatch, "one\n", fail=True)


def test_ctrl_c_keeps_what_has_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def ask(messages: Messages) -> Generator[str]:
        try:
            yield "half"
            raise KeyboardInterrupt
        finally:
            closed.append(len(messages))

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    converse(ask, len, [])
    assert closed == [1, 3]  # the half answer stays in the history
    assert ", stopped]" in capsys.readouterr().err


def test_a_terminal_never_gets_escape_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    write_answer("a\x1b]0;title\x07b\n\tc")
    assert screen.getvalue() == "a\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}b\n\tc"


def test_a_pipe_gets_the_text_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    write_answer("a\x1bb")
    assert capsys.readouterr().out == "a\x1bb"
