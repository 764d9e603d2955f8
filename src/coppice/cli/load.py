"""Loading the engine into this process, with a spinner while it takes its time."""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

from coppice.cli.console import err
from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError

if TYPE_CHECKING:
    from coppice import LLM
    from coppice.cli.options import Given


def load_llm(config: EngineConfig) -> LLM:
    """Load the configured model; the spinner shows only in a terminal.

    Raises:
        ConfigError: the model cannot be loaded as configured.
    """
    with err().status(f"Loading {config.model}"):
        from coppice import LLM

        settings = dataclasses.asdict(config)
        return LLM(settings.pop("model"), dtype=settings.pop("dtype"), **settings)


def engine_config(given: Given, model: str | None = None) -> EngineConfig:
    """The engine's config for a person at a terminal.

    A person who names no seed wants another answer next time, so one is drawn then.

    Args:
        given: what was typed.
        model: the model named by an argument, which stands for ``--model``.

    Raises:
        ConfigError: the argument and ``--model`` name two models.
    """
    flag = given.flags.get("model")
    if None not in (flag, model) and flag != model:
        raise ConfigError(
            f"Two models were named, {model!r} and --model {flag!r}; name one.", param="model"
        )
    resolved = given.resolve(EngineConfig, **({} if model is None else {"model": model}))
    if resolved.origins["seed"].kind == "default":
        return dataclasses.replace(resolved.config, seed=secrets.randbits(32))
    return resolved.config
