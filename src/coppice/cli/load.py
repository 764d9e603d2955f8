"""Loading the engine into this process, with a spinner while it takes its time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from coppice.cli.console import err
from coppice.engine.config import EngineConfig

if TYPE_CHECKING:
    from coppice import LLM


def load_llm(config: EngineConfig) -> LLM:
    """Load the configured model; the spinner shows only in a terminal.

    Raises:
        ConfigError: the model cannot be loaded as configured.
    """
    with err().status(f"Loading {config.model}"):
        from coppice import LLM

        settings = dataclasses.asdict(config)
        return LLM(settings.pop("model"), dtype=settings.pop("dtype"), **settings)
