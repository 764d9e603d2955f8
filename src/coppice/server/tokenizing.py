"""Which tokenizer belongs to a configured model."""

from __future__ import annotations

from coppice.engine.config import EngineConfig
from coppice.errors import UnsupportedModelError
from coppice.models.locate import locate
from coppice.models.tokenizer import Tokenizer


def tokenizer_of(config: EngineConfig) -> Tokenizer:
    """The tokenizer of the engine's model.

    Raises:
        CheckpointError: it is missing or malformed.
    """
    path = locate(config.model)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    raise UnsupportedModelError(f"{path}: GGUF files cannot be served yet; name a folder.")
