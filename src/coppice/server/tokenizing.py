"""Which tokenizer belongs to a configured model."""

from __future__ import annotations

from coppice.engine.config import EngineConfig
from coppice.models.locate import locate
from coppice.models.tokenizer import Tokenizer


def tokenizer_of(config: EngineConfig) -> Tokenizer:
    """The tokenizer of the engine's model, without torch.

    Raises:
        CheckpointError: it is missing or malformed.
    """
    return Tokenizer.open(locate(config.model))
