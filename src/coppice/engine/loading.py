"""From a configuration to a model the engine can run."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.engine.config import EngineConfig
from coppice.engine.messages import ModelFacts
from coppice.engine.start import remember
from coppice.kernels import describe, num_threads, set_num_threads
from coppice.kernels.rows import Rows
from coppice.models.kv import KVLayout
from coppice.models.load import LoadedModel, check_vocabulary, load_model
from coppice.models.packs import Kept
from coppice.models.tokenizer import Tokenizer
from coppice.weights.stored import StoredPack

KV_MARKS = {"auto": "", "int8": "-kv8"}
"""What the fingerprint says of KV pages: answers depend on their type."""


class Decoder(Protocol):
    """What the step needs of a model."""

    def forward(self, rows: Rows, pool: KVPool) -> Tensor:
        """Float32 logits ``[W, V]`` of ``rows.logit_rows``; K and V written to the pool."""
        ...

    def greedy(self, rows: Rows, pool: KVPool, vocab_size: int) -> list[int] | None:
        """Instead of logits the first largest one's token, or ``-fault``; None if it cannot."""
        ...

    def kv_layout(self, page_size: int) -> KVLayout:
        """Shapes of the KV pages."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A decoder, its tokenizer and the facts the engine reports."""

    decoder: Decoder
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    facts: ModelFacts
    """``num_pages`` and ``page_size`` are filled in by the engine."""


def load_engine_model(config: EngineConfig, early: Future[StoredPack] | None = None) -> EngineModel:
    """Load the configured model and its tokenizer.

    Args:
        config: which model and how.
        early: its packed weights, being read since before PyTorch was imported.

    Raises:
        CheckpointError: it is missing, damaged or not supported; nothing stays resident.
        ConfigError: settings that do not fit it.
    """
    if config.num_threads is not None:
        set_num_threads(config.num_threads)
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        quantization=None if config.quantization == "none" else config.quantization,
        max_context=config.context_length,
        adapter=config.adapter,
        kept=Kept(config.cache_folder, early, config.keep_packed_mib << 20)
        if config.keep_packed
        else None,
    )
    remember(config, loaded.pack)
    tokenizer = tokenizer_of(loaded)
    check_vocabulary(loaded.config, tokenizer.vocab_size)
    facts = ModelFacts(
        name=_name(config.model),
        architecture=loaded.config.model_type,
        context_length=loaded.decoder.max_context,
        vocab_size=loaded.config.vocab_size,
        num_params=loaded.num_params,
        weight_bytes=loaded.weight_bytes,
        weight_format=loaded.quantization or loaded.dtype,
        fingerprint=f"cop_{loaded.fingerprint[:16]}{KV_MARKS[config.kv_cache_dtype]}",
        page_size=config.page_size,
        num_pages=0,
        kernels=describe(),
        num_threads=num_threads(),
    )
    eos_ids = frozenset(loaded.config.eos_token_ids) | frozenset(tokenizer.eos_ids)
    return EngineModel(decoder=loaded.decoder, tokenizer=tokenizer, eos_ids=eos_ids, facts=facts)


def tokenizer_of(loaded: LoadedModel) -> Tokenizer:
    """The tokenizer that came with a model."""
    source = loaded.tokenizer_source
    return Tokenizer.from_folder(source) if isinstance(source, Path) else source.tokenizer


def _name(model: str) -> str:
    """What clients call the model: a folder or file by its last part, the rest as given."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else model
