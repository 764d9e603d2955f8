"""GGUF metadata to a Hugging Face style configuration, one small reader per architecture.

The result goes through `coppice.models.registry.read_config` like any ``config.json``, so
its rules and refusals hold here too. What a GGUF file does not say (a scale that llama.cpp
decides by the layer count, Llama 3's rope bands) is recovered here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.fields import MAX_LAYERS
from coppice.models.gguf.quants import dequantize
from coppice.models.gguf.reader import GGUFReader

# (factor, low_freq_factor, high_freq_factor, original context) of the published Llama 3 models
_LLAMA3_BANDS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
_GEMMA3_PERIOD = 6
_MAX_VECTOR = 65_536


class Metadata:
    """Typed access to a file's metadata below one architecture's prefix."""

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self.architecture = self._architecture()

    def _architecture(self) -> str:
        found = self.reader.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise CheckpointError(f"{self.reader.path.name} names no general.architecture.")
        return found

    def has(self, key: str) -> bool:
        """Whether ``<architecture>.key`` is there."""
        return f"{self.architecture}.{key}" in self.reader.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer, also given as an array of equal integers, one per layer."""
        return int(self._number(key, default, (int, np.integer)))

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal that gives the stored float32."""
        found = self._number(key, default, (int, float, np.integer, np.floating))
        value = float(str(np.float32(found)))
        if not math.isfinite(value):
            raise self._wrong(key, found)
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        found = self.reader.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(found, str):
            raise self._wrong(key, found)
        return found

    def vector(self, name: str) -> list[float] | None:
        """A small tensor's values, such as ``rope_freqs.weight``; ``None`` if absent."""
        info = self.reader.tensors.get(name)
        if info is None:
            return None
        if math.prod(info.shape) > _MAX_VECTOR:
            raise CheckpointError(f"{name} has shape {info.shape}, too large for rope factors.")
        values = dequantize(self.reader.tensor_bytes(info), info.kind)
        return [float(value) for value in values]

    def _number(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        found = self.reader.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise CheckpointError(
                f"{self.reader.path.name} lacks {self.architecture}.{key}; the file is incomplete."
            )
        if isinstance(found, np.ndarray):
            if found.size == 0 or not (found == found[0]).all():
                raise UnsupportedModelError(
                    f"{self.architecture}.{key} differs between layers, which is not supported."
                )
            found = found[0]
        if isinstance(found, (bool, np.bool_)) or not isinstance(found, kinds):
            raise self._wrong(key, found)
        return found

    def _wrong(self, key: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.architecture}.{key} is {found!r:.80}; the file is damaged.")


def hf_config(reader: GGUFReader) -> dict[str, Any]:
    """The configuration as ``config.json`` would say it.

    Raises:
        UnsupportedModelError: the architecture, or a feature of it, is not built.
        CheckpointError: a key is missing or out of place.
    """
    metadata = Metadata(reader)
    read = _READERS.get(metadata.architecture)
    if read is None:
        raise UnsupportedModelError(
            f"GGUF architecture {metadata.architecture[:80]!r} is not supported; supported are "
            f"{', '.join(sorted(_READERS))}."
        )
    return {**_base(metadata), **_tokens(reader), **read(metadata)}


def _base(m: Metadata) -> dict[str, Any]:
    """What all architectures share. Rope scaling is read here unless a reader replaces it."""
    heads, hidden = m.integer("attention.head_count"), m.integer("embedding_length")
    head_dim = m.integer("attention.key_length", hidden // max(heads, 1))
    if m.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("Keys and values of different lengths are not supported.")
    embedding = m.reader.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{m.reader.path.name} has no token_embd.weight; it is incomplete.")
    rotated = m.integer("rope.dimension_count", head_dim)
    if rotated != head_dim and m.architecture != "phi3":
        raise UnsupportedModelError(f"Rope over {rotated} of {head_dim} dims is not supported.")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": m.integer("feed_forward_length"),
        "num_hidden_layers": m.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": m.integer("context_length"),
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(m),
        "tie_word_embeddings": "output.weight" not in m.reader.tensors,
    }


def _tokens(reader: GGUFReader) -> dict[str, Any]:
    found = {}
    for key in ("bos_token_id", "eos_token_id"):
        value = reader.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, int) and not isinstance(value, bool):
            found[key] = value
    return found


def _scaling(m: Metadata) -> dict[str, Any] | None:
    kind = m.text("rope.scaling.type", "none")
    if kind == "none":
        # llama.cpp before the type key existed
        factor = m.number("rope.scale_linear", 1.0)
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "linear":
        return {"rope_type": "linear", "factor": m.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(m)
    if kind == "longrope" and m.architecture == "phi3":
        return None  # its factors are tensors; see _phi3
    raise UnsupportedModelError(f"Rope scaling {kind[:40]!r} in a GGUF file is not supported.")


def _yarn(m: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": m.number("rope.scaling.factor"),
        "original_max_position_embeddings": m.integer("rope.scaling.original_context_length"),
    }
    names = {
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
        "rope.scaling.attn_factor": "attention_factor",
    }
    found.update({ours: m.number(key) for key, ours in names.items() if m.has(key)})
    for key in ("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor"):
        if m.has(key):
            raise UnsupportedModelError(f"{m.architecture}.{key} is not supported.")
    return found


def _llama(m: Metadata) -> dict[str, Any]:
    """Llama, Mistral and Mixtral share GGUF's ``llama``; windows and experts tell them apart."""
    found: dict[str, Any] = {"model_type": "llama"}
    experts = m.integer("expert_count", 0)
    if m.has("attention.sliding_window"):
        found |= {"model_type": "mistral", "sliding_window": m.integer("attention.sliding_window")}
    if experts:
        found |= {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": m.integer("expert_used_count"),
        }
    tensors = m.reader.tensors
    if "blk.0.attn_q.bias" in tensors:
        found["attention_bias"] = True
    if "blk.0.ffn_up.bias" in tensors:
        found["mlp_bias"] = True
    factors = m.vector("rope_freqs.weight")
    if factors is not None:
        found["rope_scaling"] = _recover_bands(m, factors)
    return found


def _recover_bands(m: Metadata, factors: list[float]) -> dict[str, Any] | None:
    """The Llama 3 rope parameters whose per-frequency factors stand in the file.

    Unknown factors are kept as they are, as LongRoPE factors with no attention scaling,
    which is the same arithmetic.
    """
    theta = m.number("rope.freq_base", 10_000.0)
    if theta <= 0:
        raise CheckpointError(f"{m.architecture}.rope.freq_base is {theta}; the file is damaged.")
    if len(set(factors)) == 1 and factors[0] == 1.0:
        return None
    for factor, low, high, original in _LLAMA3_BANDS:
        expected = band_factors(theta, len(factors), (factor, low, high, original))
        if np.allclose(factors, expected, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": m.integer("context_length"),
    }


def band_factors(theta: float, count: int, band: tuple[float, float, float, int]) -> list[float]:
    """How much each frequency is divided by under Llama 3's scaling.

    Args:
        theta: rope base.
        count: frequencies, half the head dimension.
        band: factor, low and high frequency factors, original context.
    """
    factor, low, high, original = band
    found = []
    for index in range(count):
        wavelength = 2 * math.pi * theta ** (index / count)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            blend = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - blend) / factor + blend))
    return found


def _qwen2(_: Metadata) -> dict[str, Any]:
    return {"model_type": "qwen2"}


def _qwen3(_: Metadata) -> dict[str, Any]:
    return {"model_type": "qwen3"}


def _qwen3moe(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_experts": m.integer("expert_count"),
        "num_experts_per_tok": m.integer("expert_used_count"),
        "moe_intermediate_size": m.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # the format has no key for it; every published model says so
    }


def _query_scale(m: Metadata, large: int) -> float:
    """``query_pre_attn_scalar``, which the format leaves to the layer count."""
    hidden, heads = m.integer("embedding_length"), m.integer("attention.head_count")
    if m.integer("block_count") == large:
        return hidden / max(heads, 1)
    return m.integer("attention.key_length", hidden // max(heads, 1))


def _gemma2(m: Metadata) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": m.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": m.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scale(m, _GEMMA2_27B_LAYERS),
    }


def _sliding_layers(m: Metadata, period: int) -> list[bool]:
    """Which layers have a window: one flag per layer, or every ``period``-th layer has none."""
    count = m.integer("block_count")
    if count > MAX_LAYERS:
        raise CheckpointError(f"The file claims {count} layers; at most {MAX_LAYERS} are read.")
    stored = m.reader.metadata.get(f"{m.architecture}.attention.sliding_window_pattern")
    if isinstance(stored, np.ndarray):
        if len(stored) != count:
            raise CheckpointError(f"The sliding window pattern does not have {count} entries.")
        return [bool(flag) for flag in stored]
    period = max(m.integer("attention.sliding_window_pattern", period), 1)
    return [(layer + 1) % period != 0 for layer in range(count)]


def _gemma3(m: Metadata) -> dict[str, Any]:
    slides = _sliding_layers(m, _GEMMA3_PERIOD)
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    found = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": m.number("rope.freq_base", 1e6),
        "rope_local_base_freq": m.number("rope.freq_base_swa", 1e4),
        "query_pre_attn_scalar": _query_scale(m, _GEMMA3_27B_LAYERS),
        "layer_types": kinds,
        "sliding_window": m.integer("attention.sliding_window"),
    }
    if m.has("final_logit_softcapping"):
        found["final_logit_softcapping"] = m.number("final_logit_softcapping")
    return found


def _phi3(m: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {"model_type": "phi3"}
    if m.has("attention.sliding_window"):
        found["sliding_window"] = m.integer("attention.sliding_window") or None
    head_dim = m.integer("embedding_length") // max(m.integer("attention.head_count"), 1)
    rotated = m.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / max(head_dim, 1)
    long, short = m.vector("rope_factors_long.weight"), m.vector("rope_factors_short.weight")
    if (long is None) != (short is None):
        raise CheckpointError(f"{m.reader.path.name} has only one of the two rope factor tensors.")
    if long is not None:
        original = m.integer("rope.scaling.original_context_length")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
        }
        if m.has("rope.scaling.attn_factor"):
            scaling["attention_factor"] = m.number("rope.scaling.attn_factor")
        found |= {"rope_scaling": scaling, "original_max_position_embeddings": original}
    return found


def _olmo2(_: Metadata) -> dict[str, Any]:
    return {"model_type": "olmo2"}


_READERS: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}
