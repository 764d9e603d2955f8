"""``coppice run``: one prompt, or a file of requests, without a server."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from coppice.cli.batch import run_file
from coppice.cli.config import AnswerConfig
from coppice.cli.console import print_note, write_answer
from coppice.cli.load import engine_config, load_llm
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError


@with_settings(EngineConfig, AnswerConfig)
def run(
    given: Given,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' or nothing reads it from a pipe.", show_default=False),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text instead of answering it as a chat.")
    ] = False,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="JSON lines, one request each."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Where the answers go, one line each.")
    ] = None,
) -> None:
    """Answer one prompt, or every line of a file, and exit.

    The answer goes to stdout, everything else to stderr.
    """
    answer = given.resolve(AnswerConfig).config
    config = engine_config(given)
    if input_file is not None or output_file is not None:
        if input_file is None or output_file is None or prompt is not None:
            raise ConfigError("A batch takes --input and --output together, and no prompt.")
        raise typer.Exit(run_file(config, input_file, output_file, defaults=answer.fields()))
    text = _prompt(prompt)
    params = answer.params()
    llm = load_llm(config)
    asked = text if raw else [{"role": "user", "content": text}]
    begin = time.perf_counter()
    pieces = []
    for piece in llm.stream(asked, params):
        pieces.append(piece)
        write_answer(piece)
    write_answer("\n")
    spent_s = time.perf_counter() - begin
    num_tokens = len(llm.tokenizer.encode("".join(pieces), add_special_tokens=False))
    print_note(f"[{num_tokens} tokens, {num_tokens / spent_s:.1f} tok/s]")


def _prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return str(prompt)
    if sys.stdin.isatty():
        raise ConfigError('Nothing to answer; give a prompt: coppice run "Once upon a time"')
    text = sys.stdin.read()
    if not text:
        raise ConfigError("The prompt read from the pipe is empty.")
    return text
