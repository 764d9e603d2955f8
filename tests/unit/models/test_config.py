"""Reading of configurations: old and new spellings agree, the unsupported is refused."""

from __future__ import annotations

from typing import Any

import pytest

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.config import LayerSpec, ModelConfig
from coppice.models.fields import MAX_DIM
from coppice.models.registry import NEUTRAL, read_config
from coppice.models.rope import frequencies
from tools.make_model import SHAPES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def llama(**changes: Any) -> ModelConfig:
    return read_config({**LLAMA, **changes})


def of(family: str, **changes: Any) -> ModelConfig:
    return read_config({**LLAMA, "model_type": family, **changes})


def windows(config: ModelConfig) -> list[int]:
    return [layer.window for layer in config.layers]


def test_llama_defaults() -> None:
    config = llama()
    assert config.head_dim == 8
    assert config.attention_scale == 8**-0.5
    assert config.layers == (LayerSpec(),) * 4
    assert config.ropes[0].theta == 10_000.0
    assert not config.tied


def test_old_and_new_rope_spelling_agree() -> None:
    law = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    old = llama(rope_theta=5e5, rope_scaling={"type": "llama3", **law})
    new = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **law})
    assert old == new
    assert old.ropes[0].original == 256


def test_gemma3_old_and_new_rope_spelling_agree() -> None:
    old = of(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
        sliding_window=32,
    )
    new = of(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32,
    )
    assert old == new
    assert windows(old) == [32, 0, 32, 0]
    assert [layer.rope for layer in old.layers] == [1, 0, 1, 0]


def test_gemma3_wrapper_with_a_sparse_text_config() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = read_config(
        {
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model"},
            "eos_token_id": [1, 106],
        }
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208
    assert config.tied
    assert windows(config)[:6] == [1024] * 5 + [0]
    assert config.ropes[0].factor == 8.0
    assert config.eos_token_ids == (1, 106)


def test_gemma2_softcaps_default_unless_null() -> None:
    assert of("gemma2").attention_softcap == 50.0
    assert of("gemma2").logit_softcap == 30.0
    null = of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert null.attention_softcap == null.logit_softcap == 0.0


def test_windows_of_each_family() -> None:
    assert windows(of("mistral", sliding_window=7)) == [7] * 4
    assert windows(of("mistral", sliding_window=None)) == [0] * 4
    assert windows(of("qwen2", sliding_window=7, max_window_layers=2)) == [0] * 4
    slides = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}
    assert windows(of("qwen2", **slides)) == [0, 0, 7, 7]
    types = ["full_attention"] * 3 + ["sliding_attention"]
    assert windows(of("qwen3", **slides, layer_types=types)) == [0, 0, 0, 7]
    assert windows(of("gemma2", sliding_window=9)) == [9, 0, 9, 0]


def test_smollm3_layers_without_positions() -> None:
    assert [layer.rope for layer in of("smollm3").layers] == [0, 0, 0, None]
    config = of("smollm3", no_rope_layers=[1, 0, 1, 1])
    assert [layer.rope for layer in config.layers] == [0, None, 0, 0]


def test_early_phi3_calls_longrope_su_or_yarn() -> None:
    law = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    extra = {"original_max_position_embeddings": 256}
    kinds = [
        of("phi3", rope_scaling={"type": kind, **law}, **extra).ropes[0]
        for kind in ("su", "yarn", "longrope")
    ]
    assert kinds[0] == kinds[1] == kinds[2]
    assert kinds[0].kind == "longrope"
    assert kinds[0].original == 256


def test_yarn_extends_the_context_and_dynamic_does_not() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert llama(rope_scaling=yarn).max_position == 4096
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert llama(rope_scaling=dynamic).max_position == 1024


def test_mixture_settings() -> None:
    config = of("qwen3_moe", num_experts=8, moe_intermediate_size=16, num_experts_per_tok=2)
    assert config.experts is not None
    assert not config.experts.renormalize
    some = of(
        "qwen3_moe",
        num_local_experts=8,
        moe_intermediate_size=16,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
    )
    assert [layer.experts for layer in some.layers] == [False, True, False, False]
    with pytest.raises(CheckpointError, match="9 but there are 8"):
        of("mixtral", num_local_experts=8, num_experts_per_tok=9)


def test_informational_keys_are_ignored() -> None:
    told = llama(
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        auto_map={"AutoModel": "x.Y"},
        pretraining_tp=2,
        attention_dropout=0.1,
        transformers_version="4.40",
        never_heard_of=3,
        use_cache=True,
    )
    assert told == llama()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sliding_window": 128}, "'sliding_window' to 128, which is not supported for 'llama'"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'.*gptq"),
        ({"num_local_experts": 4}, "'num_local_experts'"),
        ({"layer_types": ["sliding_attention"] * 4}, "'layer_types'"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' = 0.5"),
        ({"residual_multiplier": 0.22}, "'residual_multiplier'"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder'"),
        ({"hidden_act": "relu2"}, "'hidden_act' to 'relu2'; supported are: silu"),
        ({"rope_scaling": {"rope_type": "magic"}}, "'rope_type' to 'magic'; supported are"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ],
)
def test_unsupported_settings_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        llama(**changes)


def test_neutral_values_pass() -> None:
    llama(**{key: values[0] for key, values in NEUTRAL.items() if values})
    llama(**{**dict.fromkeys(NEUTRAL), "layer_types": ["full_attention"] * 4})


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_bidirectional_gemma_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        of(family, use_bidirectional_attention=True)


@pytest.mark.parametrize("name", ["lama", "bert", "deepseek_v3", "LLAMA", ""])
def test_unknown_architecture(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported; supported are: gemma2"):
        of(name)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UnsupportedModelError, match="Did you mean 'mistral'"):
        of("mistrall")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "must be an integer"),
        ({"hidden_size": True}, "must be an integer"),
        ({"hidden_size": 0}, "between 1 and"),
        ({"hidden_size": 10**30}, "between 1 and"),
        ({"num_hidden_layers": 5000}, "at most 1024"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"rms_norm_eps": 0}, "above 0"),
        ({"rms_norm_eps": float("nan")}, "above 0"),
        ({"rms_norm_eps": float("inf")}, "above 0"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "above 0"),
        ({"eos_token_id": "</s>"}, "token id"),
        ({"eos_token_id": [-1]}, "token id"),
        ({"layer_types": ["full_attention"], "model_type": "qwen2"}, "1 entries.*4 layers"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config"),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1.0] * 4},
                "model_type": "phi3",
            },
            "list of 4 positive",
        ),
    ],
)
def test_broken_settings_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        llama(**changes)


@pytest.mark.parametrize("raw", [[], None, 3, "x", {}])
def test_not_a_configuration(raw: Any) -> None:
    with pytest.raises(CheckpointError):
        read_config(raw)


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**70, 0.5, 1e300, float("nan"), float("inf")),
    *("", "gelu", [], [1], [None], ["sliding_attention"] * 4, [[1, 2]] * 4, {}),
    *({"rope_type": kind, "factor": 2.0} for kind in ("linear", "yarn", "longrope", "llama3", 3)),
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [None] * 8},
    {"rope_type": "yarn", "factor": 1e30, "rope_theta": 1e-30, "beta_fast": 1e30},
    {"rope_type": "yarn", "factor": 1e30, "beta_fast": 1e30, "beta_slow": 1e-30},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1},
    {"rope_type": "yarn", "original_max_position_embeddings": 1},
    {"full_attention": None, "sliding_attention": {"rope_type": "linear"}},
    {"full_attention": 3, "sliding_attention": [1]},
    {1: 2},
]
MORE = ["rope_scaling", "rope_parameters", "rope_theta", "original_max_position_embeddings"]
MORE += ["eos_token_id", "text_config", "sliding_window_pattern", "max_window_layers"]
KEYS = sorted({*(key for shape in SHAPES.values() for key in shape), *NEUTRAL, *MORE})


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_any_setting_is_read_or_refused(shape: str) -> None:
    for key in KEYS:
        for value in ODD:
            try:
                config = read_config({**SHAPES[shape], key: value})
                for rope in config.ropes:
                    inverse, scale = frequencies(rope, config.max_position)
                    assert scale > 0
                    assert not inverse.isnan().any()
            except CheckpointError:
                continue
            assert 1 <= config.max_position <= MAX_DIM
            assert all(layer.window >= 0 for layer in config.layers)
