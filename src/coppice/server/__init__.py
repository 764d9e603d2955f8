"""HTTP: the OpenAI-compatible server in front of an engine process.

It owns keys, limits, admission, the protocol, text and streams; it refuses to know
anything about the model but its facts, its tokenizer and its chat template, and never
imports torch.

Invariant: every accepted call ends once, and is counted once by how it ended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.server.config import ServerConfig

if TYPE_CHECKING:
    from coppice.engine.config import EngineConfig
    from coppice.server.dumps import Dumps

__all__ = ["ServerConfig", "run"]

MMAP_THRESHOLD = 256 << 10
"""A large body's buffers go back to the system with it."""


def _dumps(config: ServerConfig) -> Dumps | None:
    from coppice.server.dumps import Dumps

    if config.dump_dir is None:
        return None
    dumps = Dumps(Path(config.dump_dir), with_text=config.dump_text)
    dumps.require_folder()
    return dumps


def run(
    server_config: ServerConfig,
    engine_config: EngineConfig,
    *,
    engine_command: Sequence[str] | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns the process's exit code.

    Prints one line when the model is ready, or one on stderr when it cannot be.

    Args:
        server_config: where to listen, who may ask.
        engine_config: which model, how much memory.
        engine_command: another engine program; it is given ``--socket PATH``.
    """
    from coppice.engine.memory import tune_allocator
    from coppice.errors import CoppiceError
    from coppice.server.engine_client import AsyncEngine
    from coppice.server.keys import KeyRing

    gc.disable()  # a start makes much and drops little; the lifecycle switches it on again
    tune_allocator(mmap_threshold=MMAP_THRESHOLD)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    command = engine_command or (
        sys.executable,
        "-P",  # else files of the folder it is started in would pass for modules
        "-m",
        "coppice.engine.process",
        "--config",
        json.dumps(dataclasses.asdict(engine_config)),
    )

    async def serve() -> int:
        keys = KeyRing.from_config(server_config)
        engine = AsyncEngine(
            command, hang_s=server_config.engine_hang_s, dumps=_dumps(server_config)
        )
        engine.begin()
        # The HTTP libraries take the better part of a second to import; the engine loads
        # its own meanwhile.
        lifecycle = await asyncio.to_thread(import_module, "coppice.server.lifecycle")
        exit_code: int = await lifecycle.Server(server_config, keys, engine, engine_config).run()
        return exit_code

    try:
        return asyncio.run(serve())
    except CoppiceError as error:
        print(f"error: {error.message} [{error.code}]", file=sys.stderr, flush=True)
        return error.exit_code
