"""Test-only: a Hugging Face toy checkpoint written as GGUF, the way llama.cpp's converter does.

Written against the ``gguf`` package and independent of the reader under test. Returns the
checkpoint the file stands for (weights dequantised by that package), so that both can be
compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import RopeScalingType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tokenizers import Tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
}
PLAIN = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}
EXPERTS = {"w1": "gate", "w3": "up", "w2": "down"}
K_QUANTS = {"Q4_K": (2, 2), "Q5_K": (2, 2), "Q6_K": (208, 0)}


def convert(
    folder: Path,
    out: Path,
    kind: str | dict[str, str] = "F32",
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Path:
    """Write ``folder`` as ``out`` (GGUF) and its dequantised twin beside it.

    Args:
        folder: ``config.json`` and ``model.safetensors``.
        out: the GGUF file to write.
        kind: storage of all matrices, or of each by a part of its name in the file
            (``attn_q.``), F32 where none is; vectors stay F32. For K-quants, which the package
            cannot make, random blocks replace the weights.
        tokenizer: written into the metadata when given, with ``options``.

    Returns:
        A folder of safetensors holding exactly the weights the GGUF file stands for.
    """
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    writer = gguf.GGUFWriter(str(out), ARCHITECTURES[model_type])
    write_config(writer, config)
    rng = np.random.default_rng(5)
    twin: dict[str, np.ndarray] = {}
    stored = {k: v.float().numpy() for k, v in load_file(folder / "model.safetensors").items()}
    weights = split_experts(stored, model_type)
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name, value in weights.items():
        if ".experts." in name:
            stacks.setdefault(stack_name(name), []).append((expert_of(name), name))
            continue
        there, back = permutation(name, config)
        offset = 1 if model_type.startswith("gemma") and name.endswith("norm.weight") else 0
        stored = there(value.astype(np.float32) + np.float32(offset))
        place = gguf_name(name, model_type)
        raw, values = encode(stored, kind_of(place, kind), rng)
        add(writer, place, raw, kind_of(place, kind) if stored.ndim > 1 else "F32")
        twin[name] = back(values) - np.float32(offset)
    for stacked, members in stacks.items():
        members.sort()
        stack = np.stack([weights[name] for _, name in members])
        raw, values = encode(stack, kind_of(stacked, kind), rng)
        add(writer, stacked, raw, kind_of(stacked, kind))
        twin.update({name: values[index] for index, name in members})
    if tokenizer is not None:
        write_tokenizer(writer, tokenizer, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    twin_folder = out.parent / f"{out.stem}-twin"
    twin_folder.mkdir()
    shutil.copy(folder / "config.json", twin_folder)
    contiguous = {name: np.ascontiguousarray(value) for name, value in twin.items()}
    save_file(contiguous, twin_folder / "model.safetensors", {"format": "pt"})
    return twin_folder


def kind_of(name: str, kind: str | dict[str, str]) -> str:
    """How the matrix of this name is stored."""
    if isinstance(kind, str):
        return kind
    return next((kind[part] for part in kind if part in name), "F32")


def encode(value: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Stored array and the float32 values it stands for."""
    if value.ndim == 1:
        kind = "F32"
    if kind in K_QUANTS:
        raw = random_blocks(value.shape, kind, rng)
    else:
        raw = quantize(np.ascontiguousarray(value, np.float32), Kind[kind])
    return raw, dequantize(raw, Kind[kind]).reshape(value.shape).astype(np.float32)


def random_blocks(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Random codes and sub-scales under small finite block scales."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    scale = rng.uniform(0.5e-4, 2e-4, (len(raw), 1)).astype(np.float16).view(np.uint8)
    at = K_QUANTS[kind][0]
    if kind == "Q6_K":
        raw[:, at : at + 2] = scale
    else:
        raw[:, 0:2] = scale
        raw[:, 2:4] = (scale.view(np.float16) * np.float16(8)).view(np.uint8)
    return raw.reshape(*shape[:-1], shape[-1] // block * size)


def add(writer: gguf.GGUFWriter, name: str, raw: np.ndarray, kind: str) -> None:
    """Add a tensor of a given storage type."""
    writer.add_tensor(name, raw, raw_dtype=None if kind in ("F32", "F16") else Kind[kind])


def permutation(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """Reordering of query and key rows (llama only), and its inverse."""
    heads = config["num_attention_heads"]
    if config["model_type"] not in ("llama", "mistral", "mixtral"):
        return (lambda value: value), (lambda value: value)
    if ".k_proj." in name:
        heads = config["num_key_value_heads"]
    elif ".q_proj." not in name:
        return (lambda value: value), (lambda value: value)

    def there(value: np.ndarray) -> np.ndarray:
        split = value.reshape(heads, 2, -1, *value.shape[1:])
        return split.swapaxes(1, 2).reshape(value.shape)

    def back(value: np.ndarray) -> np.ndarray:
        split = value.reshape(heads, -1, 2, *value.shape[1:])
        return split.swapaxes(1, 2).reshape(value.shape)

    return there, back


def split_experts(weights: dict[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """Stacked expert tensors, as newer transformers save them, as one tensor per expert."""
    out: dict[str, np.ndarray] = {}
    names = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, value in weights.items():
        at = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = np.split(both, 2)
                out[f"{at}.{expert}.{names[0]}.weight"] = gate
                out[f"{at}.{expert}.{names[1]}.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                out[f"{at}.{expert}.{names[2]}.weight"] = down
        else:
            out[name] = value
    return out


def expert_of(name: str) -> int:
    """The expert's number in a tensor name."""
    return int(name.partition(".experts.")[2].partition(".")[0])


def stack_name(name: str) -> str:
    """``model.layers.0.mlp.experts.3.up_proj.weight`` to ``blk.0.ffn_up_exps.weight``."""
    part = name.split(".")[-2]
    return (
        f"blk.{name.split('.')[2]}.ffn_{EXPERTS.get(part, part.removesuffix('_proj'))}_exps.weight"
    )


def gguf_name(name: str, model_type: str) -> str:
    """A Hugging Face name in llama.cpp's words."""
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
    if not name.startswith("model.layers."):
        return top.get(name, "output") + ".weight"
    _, _, layer, rest = name.split(".", 3)
    part, _, role = rest.rpartition(".")
    if part == "post_attention_layernorm":
        after = model_type.startswith("gemma") or model_type == "olmo2"
        short = "post_attention_norm" if after else "ffn_norm"
    else:
        short = PLAIN[part]
    return f"blk.{layer}.{short}.{role}"


def write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The metadata a converter writes."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    kind = config["model_type"]
    if config.get("sliding_window") and kind in (
        "mistral",
        "mixtral",
        "gemma2",
        "gemma3_text",
        "phi3",
    ):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    write_rope(writer, config, head_dim)


def write_rope(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    """Rope base, scaling and factor tensors."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    writer.add_rope_freq_base(theta)
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    match rope.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "longrope":
            original = config.get("original_max_position_embeddings")
            writer.add_rope_scaling_orig_ctx_len(
                original or rope["original_max_position_embeddings"]
            )
            for name in ("long", "short"):
                factors = np.array(rope[f"{name}_factor"], np.float32)
                writer.add_tensor(f"rope_factors_{name}.weight", factors)
        case "llama3":
            factors = llama3_factors(rope, theta, head_dim)
            writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """What the converter computes for ``rope_freqs.weight``."""
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for frequency in theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def write_tokenizer(
    writer: gguf.GGUFWriter,
    tokenizer: Tokenizer,
    *,
    pre: str = "gpt-2",
    specials: dict[str, int] | None = None,
    template: str | None = None,
) -> None:
    """A ``tokenizers`` BPE as metadata: byte-level with merges, or scored pieces."""
    spec = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = {entry["content"]: entry["special"] for entry in spec["added_tokens"]}
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in spec["model"]["merges"]
    ]
    scored = spec["model"]["byte_fallback"]
    types: list[int] = []
    for token in tokens:
        if token in added:
            types.append(3 if added[token] else 4)
        elif scored and len(token) == 6 and token.startswith("<0x"):
            types.append(6)
        else:
            types.append(1)
    if scored:
        types[vocab["<unk>"]] = 2
        ranks = {
            left + right: -float(rank + 1)
            for rank, (left, right) in reversed(list(enumerate(merges)))
        }
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in (specials or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    if template is not None:
        writer.add_chat_template(template)
