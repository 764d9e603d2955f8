"""Random toy checkpoints of every supported architecture, made through transformers.

Three per family, differing in heads, KV heads, rope, biases, windows and tying. Windows are
shorter than the prompts of the tests, so that they bite.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

HEADS = [
    {"num_attention_heads": 4, "num_key_value_heads": 4},
    {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"num_attention_heads": 6, "num_key_value_heads": 1},
]
WIDE = [{**heads, "head_dim": dim} for heads, dim in zip(HEADS, (16, 24, 8), strict=True)]


def rope(**parameters: Any) -> dict[str, Any]:
    """The new spelling of rope parameters."""
    return {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default", **parameters}}


LLAMA3 = rope(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def longrope(count: int, original: int = 128, **extra: Any) -> dict[str, Any]:
    """LongRoPE with distinct short and long factors for ``count`` rotated dim pairs."""
    return {
        "original_max_position_embeddings": original,
        **rope(
            rope_type="longrope",
            short_factor=[1.0 + 0.02 * i for i in range(count)],
            long_factor=[1.5 + 0.7 * i for i in range(count)],
            **extra,
        ),
    }


def gemma3_rope(**full: Any) -> dict[str, Any]:
    """Gemma 3's two sets: one for global layers, one for sliding ones."""
    return {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6, **full},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }


MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 7, "moe_intermediate_size": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 37}

TOYS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**HEADS[0], **UNTIED},
        {**HEADS[1], **LLAMA3, **TIED, "attention_bias": True, "mlp_bias": True},
        {**WIDE[2], **YARN, "rms_norm_eps": 1e-5},
    ],
    "mistral": [
        {**HEADS[1], "sliding_window": 50},
        {**WIDE[0], "sliding_window": None, **rope(rope_theta=1e6)},
        {**HEADS[2], "sliding_window": 16, **TIED, **rope(rope_type="linear", factor=3.0)},
    ],
    "qwen2": [
        {**HEADS[0], **TIED},
        {**HEADS[1], **SLIDING, "max_window_layers": 1, **YARN},
        {**HEADS[2], **SLIDING, "max_window_layers": 0, **UNTIED, **rope(rope_theta=1e6)},
    ],
    "qwen3": [
        {**WIDE[0], **TIED},
        {**WIDE[1], **SLIDING, "max_window_layers": 2, "attention_bias": True},
        {**WIDE[2], **YARN, **UNTIED},
    ],
    "gemma2": [
        {**WIDE[0], "sliding_window": 40, "query_pre_attn_scalar": 16},
        {**WIDE[1], "sliding_window": 64, "query_pre_attn_scalar": 12, "attention_bias": True},
        {
            **WIDE[2],
            "sliding_window": 21,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 0.5,
        },
    ],
    "gemma3_text": [
        {**WIDE[0], "sliding_window": 40, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
        {
            **WIDE[1],
            "sliding_window": 30,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 30,
            **gemma3_rope(rope_type="linear", factor=8.0),
        },
        {
            **WIDE[2],
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "attention_bias": True,
            "final_logit_softcapping": 1.5,
            **gemma3_rope(rope_theta=3e5),
        },
    ],
    "phi3": [
        {**HEADS[0], "sliding_window": 33},
        {**HEADS[1], **longrope(6), **UNTIED},
        {
            **HEADS[1],
            **longrope(6, partial_rotary_factor=0.75),
            **TIED,
            "hidden_size": 64,
        },
    ],
    "olmo2": [
        {**HEADS[0], **UNTIED},
        {**HEADS[1], "attention_bias": True, **rope(rope_theta=5e5)},
        {**HEADS[2], **TIED, **YARN},
    ],
    "smollm3": [
        {**HEADS[0], "num_hidden_layers": 5, **TIED},
        {**HEADS[1], "no_rope_layers": [0, 1, 0], "attention_bias": True, **UNTIED},
        {**HEADS[2], **SLIDING, "no_rope_layer_interval": 2, "mlp_bias": True, **YARN},
    ],
    "mixtral": [
        {**HEADS[0], **MOE},
        {**HEADS[1], **MOE, "num_experts_per_tok": 3, "sliding_window": 45, **TIED},
        {**WIDE[2], **MOE, "num_local_experts": 4, "num_experts_per_tok": 1},
    ],
    "qwen3_moe": [
        {**WIDE[0], **QWEN_MOE, "num_experts_per_tok": 3, "norm_topk_prob": True},
        {**WIDE[1], **QWEN_MOE, "num_experts_per_tok": 2, "decoder_sparse_step": 2, **TIED},
        {
            **WIDE[2],
            **QWEN_MOE,
            **SLIDING,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [0],
            "attention_bias": True,
        },
    ],
}


def reference(family: str, settings: dict[str, Any], seed: int) -> Any:
    """A transformers model with random weights, norms and biases included."""
    config = AutoConfig.for_model(family, **{**COMMON, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start as constants: make them count
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(3.0)  # far enough from zero for attention to be uneven
    return model
