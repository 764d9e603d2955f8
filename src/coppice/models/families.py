"""The architectures built here: one small reader of ``config.json`` per family.

A reader turns a checkpoint's words into a `ModelConfig`; everything after it is shared. To
add a family, add a reader and a line to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.config import ACTIVATIONS, ExpertSpec, LayerSpec, ModelConfig, NormNames
from coppice.models.fields import MAX_DIM, MAX_LAYERS, Fields, short
from coppice.models.rope import RopeSpec, max_context, read_rope

MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Family:
    """How one ``model_type`` is read, and what its architecture assumes by default."""

    read: Callable[[Fields], ModelConfig]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _base(
    f: Fields, *, theta: float = 10_000.0, partial: bool = False, activation: str = "hidden_act"
) -> dict[str, Any]:
    """The settings all families share, as keyword arguments of `ModelConfig`."""
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{heads} heads cannot share {kv_heads} key-value heads evenly.")
    head_dim = f.integer("head_dim", max(hidden // heads, 1))
    max_position = f.integer("max_position_embeddings")
    ropes = _ropes(f, theta, head_dim, max_position, partial)
    return {
        "model_type": f.raw["model_type"],
        "vocab_size": f.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": f.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": min([_reach(rope) for rope in ropes]),
        "ropes": ropes,
        "attention_scale": head_dim**-0.5,
        "activation": f.choice(activation, ACTIVATIONS, "silu"),
        "norm_eps": f.number("rms_norm_eps", 1e-6),
        "tied": f.flag("tie_word_embeddings"),
        "bos_token_id": _token_ids(f, "bos_token_id")[0] if f.value("bos_token_id") else None,
        "eos_token_ids": _token_ids(f, "eos_token_id"),
    }


def _reach(rope: RopeSpec) -> int:
    """Longest context of one set of angles; YaRN files often state the unstretched one."""
    stretched = int(rope.original * rope.factor) if rope.kind == "yarn" else 0
    return min(max(max_context(rope), stretched), MAX_DIM)


def _ropes(
    f: Fields, theta: float, head_dim: int, max_position: int, partial: bool
) -> tuple[RopeSpec, ...]:
    """The one set of rope parameters most families have (old and new spelling)."""
    return (
        read_rope(
            _object(f, "rope_scaling") or _object(f, "rope_parameters"),
            theta=f.number("rope_theta", theta),
            head_dim=head_dim,
            max_position=max_position,
            partial=f.number("partial_rotary_factor", 1.0) if partial else None,
            original=_original(f),
        ),
    )


def _original(f: Fields) -> int | None:
    key = "original_max_position_embeddings"
    return None if f.value(key) is None else f.integer(key)


def _object(f: Fields, key: str) -> Mapping[str, Any]:
    found = f.value(key, {})
    if not isinstance(found, Mapping):
        raise f.wrong(key, found, "an object")
    return found


def _token_ids(f: Fields, key: str) -> tuple[int, ...]:
    found = f.value(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise f.wrong(key, found, "a token id or a list of them")
    return tuple(ids)


def _num_layers(f: Fields) -> int:
    count = f.integer("num_hidden_layers")
    if count > MAX_LAYERS:
        raise f.wrong("num_hidden_layers", count, f"at most {MAX_LAYERS}")
    return count


def _uniform(f: Fields, *, windowed: bool) -> tuple[LayerSpec, ...]:
    """The same layer throughout, with ``sliding_window`` where the family honours it."""
    window = f.integer("sliding_window", 0, low=0) if windowed else 0
    return (LayerSpec(window=window),) * _num_layers(f)


def _layers_by_type(f: Fields, default: list[str], **extra: Any) -> tuple[LayerSpec, ...]:
    """Layers alternating between full and sliding attention, from ``layer_types``."""
    types = f.sequence("layer_types", len(default)) or default
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"config.json lists {short(kind)} in 'layer_types'; supported are: "
                "'full_attention', 'sliding_attention'."
            )
    window = f.integer("sliding_window") if "sliding_attention" in types else 0
    f.used.add("sliding_window")
    ropes = extra.get("ropes", {})
    return tuple(
        LayerSpec(window=window if kind == "sliding_attention" else 0, rope=ropes.get(kind, 0))
        for kind in types
    )


def _llama(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias")
    return ModelConfig(
        **_base(f),
        layers=_uniform(f, windowed=False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def _mistral(f: Fields) -> ModelConfig:
    return ModelConfig(**_base(f), layers=_uniform(f, windowed=True))


def _window_from(f: Fields) -> list[str]:
    """Qwen's older spelling: layers from ``max_window_layers`` on slide, if any do."""
    slides = f.flag("use_sliding_window") and f.value("sliding_window") is not None
    first = f.integer("max_window_layers", 28, low=0)
    return [
        "sliding_attention" if slides and i >= first else "full_attention"
        for i in range(_num_layers(f))
    ]


def _qwen2(f: Fields) -> ModelConfig:
    return ModelConfig(**_base(f), layers=_layers_by_type(f, _window_from(f)), qkv_bias=True)


def _qwen3(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias")
    return ModelConfig(
        **_base(f),
        layers=_layers_by_type(f, _window_from(f)),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )


_GEMMA_NORMS = NormNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def _gemma(
    f: Fields, base: dict[str, Any], final_softcap: float = 0.0, **extra: Any
) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    bias = f.flag("attention_bias")
    base["attention_scale"] = f.number("query_pre_attn_scalar") ** -0.5
    return ModelConfig(
        **base,
        norms=_GEMMA_NORMS,
        norm_offset=1.0,
        qkv_bias=bias,
        output_bias=bias,
        scale_embedding=True,
        logit_softcap=f.optional_number("final_logit_softcapping", absent=final_softcap),
        **extra,
    )


def _gemma2(f: Fields) -> ModelConfig:
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(_num_layers(f))]
    return _gemma(
        f,
        _base(f, activation="hidden_activation"),
        final_softcap=30.0,
        layers=_layers_by_type(f, types),
        attention_softcap=f.optional_number("attn_logit_softcapping", absent=50.0),
    )


def _gemma3(f: Fields) -> ModelConfig:
    count = _num_layers(f)
    period = f.integer("sliding_window_pattern", 6)
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    parts = {"full_attention": 0, "sliding_attention": 1}
    nested = _object(f, "rope_parameters")
    if nested and not set(nested) <= set(parts):
        raise UnsupportedModelError(
            "Gemma 3 needs 'rope_parameters' for 'full_attention' and 'sliding_attention' each; "
            f"found {short(sorted(nested))}."
        )
    laws = Fields(nested, where="config.json (rope_parameters)")
    full = {**_object(laws, "full_attention"), **_object(f, "rope_scaling")}
    slide = _object(laws, "sliding_attention")
    thetas = (f.number("rope_theta", 1e6), f.number("rope_local_base_freq", 1e4))
    plain = f.replaced(rope_scaling=None, rope_parameters=None)
    base = _base(plain, activation="hidden_activation")
    base["ropes"] = tuple(
        read_rope(
            params,
            theta=theta,
            head_dim=base["head_dim"],
            max_position=base["max_position"],
        )
        for params, theta in zip((full, slide), thetas, strict=True)
    )
    layers = _layers_by_type(f, types, ropes=parts)
    return _gemma(f, base, layers=layers, qk_norm="head")


def _phi3(f: Fields) -> ModelConfig:
    scaling = dict(_object(f, "rope_scaling") or _object(f, "rope_parameters"))
    for key in ("type", "rope_type"):
        if scaling.get(key) == "yarn":  # early Phi-3 files call LongRoPE so
            scaling[key] = "longrope"
    base = _base(f.replaced(rope_scaling=scaling), partial=True)
    return ModelConfig(**base, layers=_uniform(f, windowed=True))


def _olmo2(f: Fields) -> ModelConfig:
    bias = f.flag("attention_bias")
    return ModelConfig(
        **_base(f),
        layers=_uniform(f, windowed=False),
        norms=NormNames(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
        qk_norm="full",
        qkv_bias=bias,
        output_bias=bias,
    )


def _smollm3(f: Fields) -> ModelConfig:
    count = _num_layers(f)
    every = f.integer("no_rope_layer_interval", 4)
    rotated = f.sequence("no_rope_layers", count)  # 1 means the layer has rope, whatever the name
    rotated = rotated or [int((i + 1) % every != 0) for i in range(count)]
    slides = f.flag("use_sliding_window") and f.value("sliding_window") is not None
    types = ["sliding_attention" if slides and not r else "full_attention" for r in rotated]
    layers = _layers_by_type(f, types)
    bias = f.flag("attention_bias")
    return ModelConfig(
        **_base(f, theta=2e6),
        layers=tuple(
            LayerSpec(window=layer.window if slides else 0, rope=0 if has_rope else None)
            for layer, has_rope in zip(layers, rotated, strict=True)
        ),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=f.flag("mlp_bias"),
    )


def _mixtral(f: Fields) -> ModelConfig:
    layers = _uniform(f, windowed=True)
    experts = _experts(
        f,
        count=f.integer("num_local_experts"),
        intermediate_size=f.integer("intermediate_size"),
        renormalize=True,
        prefixes=("block_sparse_moe", "mlp"),
        gate="w1",
        up="w3",
        down="w2",
    )
    return ModelConfig(
        **_base(f, theta=1e6),
        layers=tuple(LayerSpec(window=layer.window, experts=True) for layer in layers),
        experts=experts,
    )


def _qwen3_moe(f: Fields) -> ModelConfig:
    plain = f.sequence("mlp_only_layers") or []
    every = f.integer("decoder_sparse_step", 1)
    slides = f.flag("use_sliding_window")
    layers = _uniform(f, windowed=slides)
    f.used.add("sliding_window")
    key = "num_experts" if "num_experts" in f.raw else "num_local_experts"  # old and new files
    f.used |= {"num_experts", "num_local_experts"}
    bias = f.flag("attention_bias")
    return ModelConfig(
        **_base(f),
        layers=tuple(
            LayerSpec(window=layer.window, experts=i not in plain and (i + 1) % every == 0)
            for i, layer in enumerate(layers)
        ),
        experts=_experts(
            f,
            count=f.integer(key),
            intermediate_size=f.integer("moe_intermediate_size"),
            renormalize=f.flag("norm_topk_prob"),
        ),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )


def _experts(f: Fields, *, count: int, **rest: Any) -> ExpertSpec:
    top_k = f.integer("num_experts_per_tok", 2)
    if count > MAX_EXPERTS:
        raise CheckpointError(f"{count} experts per layer are asked for; at most {MAX_EXPERTS}.")
    if top_k > count:
        raise CheckpointError(f"'num_experts_per_tok' is {top_k} but there are {count} experts.")
    return ExpertSpec(count=count, top_k=top_k, **rest)


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3, {"head_dim": 128}),
    "gemma2": Family(
        _gemma2,
        {
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": Family(
        _gemma3,
        {
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": Family(_phi3, {"rms_norm_eps": 1e-5}),
    "olmo2": Family(_olmo2, {"rms_norm_eps": 1e-5}),
    "smollm3": Family(_smollm3, {"tie_word_embeddings": True}),
    "mixtral": Family(_mixtral, {"rms_norm_eps": 1e-5}),
    "qwen3_moe": Family(_qwen3_moe),
}
