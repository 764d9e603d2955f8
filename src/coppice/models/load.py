"""From a name to a model that runs: the one entry point of this room."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from coppice.errors import CheckpointError, ConfigError
from coppice.kernels import get_ops
from coppice.kernels.interface import Ops
from coppice.models.adapter import AdaptedSource, Adapter
from coppice.models.build import Progress, build_weights
from coppice.models.checkpoint import Checkpoint, open_folder
from coppice.models.config import ModelConfig
from coppice.models.decoder import Decoder
from coppice.models.locate import BUNDLED, locate
from coppice.models.packs import Kept, open_packs
from coppice.models.plan import plan_of
from coppice.models.quantized.source import NAME_KEY
from coppice.models.registry import read_config
from coppice.models.source import TensorSource
from coppice.weights import BF16, F32, Format
from coppice.weights.names import Scheme
from coppice.weights.names import scheme as named_scheme

DType = Literal["auto", "float32", "bfloat16"]
_FORMATS: dict[str, Format] = {"float32": F32, "bfloat16": BF16}


PACKED_FROM = 32_000_000
"""Parameters from which packed weights are worth keeping; smaller models pack in no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder with all that is known about it.

    Attributes:
        folder: where tokenizer files lie (the parent folder, for a GGUF file).
        tokenizer_source: what `coppice.models.tokenizer` loads from: the folder, or the
            opened GGUF file's tokenizer.
        num_params: parameters, tied matrices counted once.
        weight_bytes: bytes of the packed weights.
        weight_format: how the checkpoint stores them, e.g. ``"safetensors/bfloat16"``.
        quantization: the format of most weights if not floats, e.g. ``"int4-g64"``.
        dtype: precision of KV pages, and of the weights that are kept as floats.
        fingerprint: hex digest of configuration, tensors, precision and kernels; caches
            made with one model are valid only under the same fingerprint.
    """

    decoder: Decoder
    config: ModelConfig
    folder: Path
    tokenizer_source: Any
    num_params: int
    weight_bytes: int
    weight_format: str
    quantization: str | None
    dtype: str
    fingerprint: str
    pack: tuple[Path, str] | None
    """Where the packed weights are kept and under which key, if they are."""


def load_model(
    model: str | Path = BUNDLED,
    *,
    dtype: DType = "auto",
    quantization: str | None = None,
    ops: Ops | None = None,
    max_context: int | None = None,
    adapter: str | Path | None = None,
    kept: Kept | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a decoder.

    Args:
        model: ``"bundled"``, a folder, a ``.gguf`` file, or a hub id ``owner/name``.
        dtype: precision of weights and KV cache; ``"auto"`` keeps the checkpoint's own
            (float16 becomes float32, which alone loses nothing).
        quantization: a name of `coppice.weights.names`: float weights are rounded to it as they
            are read; of weights stored with no more bits only the activations change. By
            default weights stay as the checkpoint has them.
        ops: operators to pack for; by default the fastest on this machine.
        max_context: longest context to serve, at most the model's own.
        adapter: a folder with a LoRA adapter to add to the weights.
        kept: where packed weights are kept for the next start; None keeps none.
        progress: called with bytes packed and bytes in all.

    Raises:
        CheckpointError: model or adapter are missing, damaged, contradictory or not supported.
            Nothing stays open or resident then.
        ConfigError: ``dtype`` is none of the three, or ``quantization`` is unknown.
    """
    if dtype not in ("auto", *_FORMATS):
        raise ConfigError(f"dtype {dtype!r} is unknown; use auto, float32 or bfloat16.")
    scheme = None if quantization is None else named_scheme(quantization)
    path = locate(model)
    if path.suffix == ".gguf":
        checkpoint, tokenizer_source = _open_gguf(path)
    else:
        checkpoint = open_folder(path)
        tokenizer_source = path
    try:
        if adapter is not None:
            checkpoint = _adapted(checkpoint, Adapter(Path(adapter)))
        return _load(
            checkpoint,
            tokenizer_source,
            dtype=dtype,
            scheme=scheme,
            ops=ops or get_ops(),
            max_context=max_context,
            kept=kept,
            progress=progress,
        )
    finally:
        checkpoint.source.close()


def _open_gguf(path: Path) -> tuple[Checkpoint, Any]:
    from coppice.models.gguf import open_gguf

    file = open_gguf(path)
    return Checkpoint(path.parent, file.config, {}, file.source), file


def _adapted(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    try:
        source = AdaptedSource(checkpoint.source, adapter)
    except CheckpointError:
        adapter.close()
        raise
    return dataclasses.replace(checkpoint, source=source)


def _load(
    checkpoint: Checkpoint,
    tokenizer_source: Any,
    *,
    dtype: DType,
    scheme: Scheme | None,
    ops: Ops,
    max_context: int | None,
    kept: Kept | None,
    progress: Progress | None,
) -> LoadedModel:
    config = _with_generation(read_config(checkpoint.config), checkpoint.generation)
    source = checkpoint.source
    if max_context is not None and not 1 <= max_context <= config.max_position:
        raise ConfigError(
            f"max_context {max_context} does not fit; this model serves 1 to "
            f"{config.max_position} tokens."
        )
    if dtype == "auto":
        dtype = "bfloat16" if source.native_dtype() == torch.bfloat16 else "float32"
    floats = _FORMATS[dtype]
    if scheme is None and checkpoint.config.get(NAME_KEY):  # checked when the source was opened
        scheme = named_scheme(checkpoint.config[NAME_KEY])
    shapes = plan_of(config, source).tensors().values()
    num_params = sum(math.prod(shape) for shape in shapes)
    depends = (checkpoint.config, source.fingerprint(), dtype, repr(scheme), ops.name)
    with open_packs(kept if num_params >= PACKED_FROM else None, *depends) as packs:
        weights = build_weights(
            config, source, ops, format=floats, scheme=scheme, packs=packs, progress=progress
        )
    decoder = Decoder(config, weights, ops, max_context=max_context, dtype=floats.dtype)
    formats = weights.formats()
    main = max(formats, key=lambda name: formats[name])
    return LoadedModel(
        decoder=decoder,
        config=config,
        folder=checkpoint.folder,
        tokenizer_source=tokenizer_source,
        num_params=num_params,
        weight_bytes=weights.nbytes,
        weight_format=source.format,
        quantization=None if main == floats.name else main,
        dtype=dtype,
        fingerprint=_fingerprint(checkpoint.config, source, dtype, ops, decoder),
        pack=None if packs.path is None else (packs.path, packs.key),
    )


def _with_generation(config: ModelConfig, generation: dict[str, Any]) -> ModelConfig:
    """Add the end tokens ``generation_config.json`` names (chat models end turns by them)."""
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    extra = [i for i in ids if type(i) is int and 0 <= i < config.vocab_size]
    merged = tuple(dict.fromkeys((*config.eos_token_ids, *extra)))
    return dataclasses.replace(config, eos_token_ids=merged)


def _fingerprint(
    config: dict[str, Any], source: TensorSource, dtype: str, ops: Ops, decoder: Decoder
) -> str:
    """What cached keys and values depend on, as a digest."""
    variants = [decoder.max_context > r.original for r in decoder.config.ropes if r.long_factor]
    weights = decoder.weights
    formats = [weights.formats(), weights.embedding.format.name, weights.head.format.name]
    parts = [config, source.fingerprint(), dtype, formats, ops.name, variants]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_vocabulary(config: ModelConfig, tokenizer_size: int) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for.

    Args:
        config: the model's.
        tokenizer_size: one more than the tokenizer's largest id.

    Raises:
        CheckpointError: the tokenizer is of another model. (Fewer ids than embeddings are
            normal: matrices are padded.)
    """
    if tokenizer_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer makes {tokenizer_size} ids but the model knows {config.vocab_size}; "
            "they belong to different models."
        )
