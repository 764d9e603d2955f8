"""``coppice serve``: the HTTP server in front of an engine process."""

from __future__ import annotations

from typing import Annotated

import typer

from coppice.cli.load import engine_config
from coppice.cli.options import Given, with_settings
from coppice.engine.config import EngineConfig
from coppice.server.config import ServerConfig


@with_settings(EngineConfig, ServerConfig)
def serve(
    given: Given,
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Same as --model.", show_default=False)
    ] = None,
) -> None:
    """Serve a model over HTTP, with the routes OpenAI clients know.

    Without arguments this serves the bundled model on http://127.0.0.1:8000, with a chat page
    at /. Stop it with Ctrl-C: running answers get time to end.
    """
    engine = engine_config(given, model_argument)
    server = given.resolve(ServerConfig).config
    from coppice.server import run

    raise typer.Exit(run(server, engine))
