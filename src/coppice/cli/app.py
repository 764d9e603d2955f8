"""The verbs put together, and the one place where an error becomes a line and a code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from coppice import __version__
from coppice.cli import bench_speculation  # noqa: F401 - adds its command to `bench`
from coppice.cli.admin import admin
from coppice.cli.bench import bench
from coppice.cli.chat import chat
from coppice.cli.console import print_error
from coppice.cli.doctor import doctor
from coppice.cli.quantize import quantize
from coppice.cli.run import run as run_prompt
from coppice.cli.serve import serve
from coppice.cli.simulate import simulate
from coppice.errors import CoppiceError

INTERRUPTED = 130

app = typer.Typer(
    name="coppice",
    help="Serve generative models on the machine you have.",
    epilog="Start with: coppice serve, then in another terminal: coppice chat --url "
    "http://127.0.0.1:8000",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coppice {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    del version  # its callback has run before any command is looked for


app.command()(serve)
app.command()(chat)
app.command("run")(run_prompt)
app.add_typer(bench, name="bench")
app.command()(quantize)
app.command()(admin)
app.command()(simulate)
app.command()(doctor)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code.

    A `CoppiceError` becomes one red line on stderr and the exit code of its class; with
    ``--debug`` it is raised, so that the traceback shows. Anything else is a bug and keeps
    its traceback.
    """
    try:
        app(list(arguments), prog_name="coppice")
    except CoppiceError as error:
        if "--debug" in arguments:
            raise
        print_error(error)
        return error.exit_code
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (a pager, `head`) has gone; keep Python from flushing into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0
