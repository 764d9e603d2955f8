"""From a configuration to a model the engine can run."""

from __future__ import annotations

from dataclasses import dataclass

from coppice.engine.config import EngineConfig
from coppice.models.decoder import Decoder
from coppice.models.checkpoint import load_model
from coppice.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A decoder, its tokenizer and the facts the engine reports."""

    decoder: Decoder
    tokenizer: Tokenizer
    name: str
    architecture: str
    context_length: int
    vocab_size: int
    num_params: int
    weight_bytes: int
    weight_format: str
    fingerprint: str
