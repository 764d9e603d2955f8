"""``coppice chat``: a conversation in the terminal, in this process or with a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coppice.cli.config import AnswerConfig
from coppice.cli.console import err, print_error, print_note, write_answer
from coppice.cli.load import engine_config, load_llm
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig
from coppice.errors import CoppiceError
from coppice.server.config import ServerConfig
from coppice.settings import settings_of

if TYPE_CHECKING:
    from coppice.cli.remote import RemoteChat

Messages = list[dict[str, str]]
Ask = Callable[[Messages], Generator[str]]
CountTokens = Callable[[str], int]

LOCAL_SETTINGS = [item.name for room in (EngineConfig, AnswerConfig) for item in settings_of(room)]
HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer."


@with_settings(EngineConfig, AnswerConfig, ServerConfig, only=[*LOCAL_SETTINGS, "api_key"])
def chat(
    given: Given,
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Same as --model.", show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to this server instead of loading a model.", metavar="URL"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions put first.")] = None,
) -> None:
    """Talk with a model; the answer streams as it is made."""
    answer = given.resolve(AnswerConfig).config
    config = engine_config(given, model_argument)
    if url is None:
        ask, count = _local(config, answer)
    else:
        from coppice.cli.remote import RemoteChat

        api_key = given.resolve(ServerConfig).config.api_key
        named = model_argument or given.flags.get("model")
        server = RemoteChat(url, api_key=api_key, model=None if named is None else str(named))
        ask, count = _remote(server, {**answer.fields(), "seed": given.flags.get("seed")})
    start: Messages = [] if system is None else [{"role": "system", "content": system}]
    converse(ask, count, start)


def _local(config: EngineConfig, answer: AnswerConfig) -> tuple[Ask, CountTokens]:
    params = answer.params()
    llm = load_llm(config)

    def ask(messages: Messages) -> Generator[str]:
        yield from llm.stream(messages, params)

    def count(text: str) -> int:
        return len(llm.tokenizer.encode(text, add_special_tokens=False))

    return ask, count


def _remote(server: RemoteChat, fields: dict[str, Any]) -> tuple[Ask, CountTokens]:
    print_note(f"Talking to {server.model}.")

    def ask(messages: Messages) -> Generator[str]:
        yield from server.stream(messages, fields)

    def count(text: str) -> int:
        return int(server.usage.get("completion_tokens", 0))

    return ask, count


def converse(ask: Ask, count: CountTokens, start: Messages) -> None:
    """Read lines, stream answers, keep the history; ends at end of input or ``/quit``.

    An error of one turn is printed and the turn is forgotten, so that the next can work.
    When input is not a terminal the first error ends the conversation instead.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print_note(HELP)
    messages = list(start)
    while (line := _read_line(interactive)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(start)
            print_note("Forgotten.")
        elif line == "/help":
            print_note(HELP)
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                answer = _answer(ask, count, turn)
            except CoppiceError as error:
                if not interactive:
                    raise
                print_error(error)
                continue
            messages = [*turn, {"role": "assistant", "content": answer}]


def _read_line(interactive: bool) -> str | None:
    try:
        if interactive:
            return err().input("[bold]> [/bold]").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(ask: Ask, count: CountTokens, turn: Messages) -> str:
    """Stream one answer to stdout; Ctrl-C keeps what has come so far."""
    begin = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    stopped = False
    with closing(ask(turn)) as stream:
        try:
            for piece in stream:
                if piece:
                    first = first or time.perf_counter()
                    pieces.append(piece)
                    write_answer(piece)
        except KeyboardInterrupt:
            stopped = True
    end = time.perf_counter()
    write_answer("\n")
    text = "".join(pieces)
    print_note(_summary(count(text), begin=begin, first=first or end, end=end, stopped=stopped))
    return text


def _summary(num_tokens: int, *, begin: float, first: float, end: float, stopped: bool) -> str:
    rate = f", {num_tokens / (end - begin):.1f} tok/s" if num_tokens and end > begin else ""
    ending = ", stopped" if stopped else ""
    return f"[first text after {first - begin:.2f} s, {num_tokens} tokens{rate}{ending}]"
