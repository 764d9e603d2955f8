"""From a parsed ``config.json`` to a `ModelConfig`, or a refusal that names the setting.

Keys that change what is computed but that the architecture's reader did not take into
account are refused (`NEUTRAL`); all other unknown keys are ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.config import ModelConfig
from coppice.models.families import FAMILIES
from coppice.models.fields import Fields, short

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_output_gate": (False,),
    "attn_temperature_tuning": (False, 0),
    "add_cross_attention": (False,),
    "clip_qkv": (),
    "decoder_sparse_step": (1,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "hidden_size_per_layer_input": (0,),
    "interpolate_factor": (1,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "scale_depth": (1,),
    "scale_emb": (1,),
    "shared_expert_intermediate_size": (0,),
    "sliding_window": (0,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Keys that change the computation, with the values (besides null) that change nothing."""


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face style configuration.

    Args:
        raw: the parsed ``config.json`` (or the equivalent a GGUF file yields).

    Raises:
        UnsupportedModelError: an architecture, or a setting of it, that is not built.
        CheckpointError: a setting is missing or contradictory.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError("config.json must hold one JSON object.")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json names no 'model_type'; is this a model folder?")
    if model_type == "gemma3":
        raw = _gemma3_text(raw)
        model_type = "gemma3_text"
    family = FAMILIES.get(model_type)
    if family is None:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnsupportedModelError(
            f"Architecture {short(model_type)} is not supported; "
            f"supported are: {', '.join(sorted([*FAMILIES, 'gemma3']))}.{hint}"
        )
    fields = Fields(raw, family.defaults)
    fields.used.add("model_type")
    config = family.read(fields)
    _refuse_unread(fields, config)
    return config


def _refuse_unread(fields: Fields, config: ModelConfig) -> None:
    """Refuse settings that change the computation and were not taken into account."""
    for key, neutral in NEUTRAL.items():
        value = fields.raw.get(key)
        if key in fields.used or value is None or value in neutral:
            continue
        if key == "layer_types" and value == ["full_attention"] * len(config.layers):
            continue
        raise UnsupportedModelError(
            f"config.json sets {key!r} to {short(value)}, which is not supported for "
            f"{config.model_type!r}; supported: {', '.join(map(repr, neutral)) or 'unset'}."
        )


def _gemma3_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text half of a Gemma 3 image-and-text checkpoint, as its own configuration."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError("A 'gemma3' config.json needs an object under 'text_config'.")
    outer = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config")
    kept = {key: raw[key] for key in outer if raw.get(key) is not None}
    return {**text, **kept}
