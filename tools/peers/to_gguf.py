"""Write a checkpoint folder as BF16 GGUF, tokenizer included, for llama.cpp to quantize.

Covers what the benchmarks compare: ``llama`` and ``qwen2`` with byte-level BPE. Vocabulary
entries the tokenizer lacks (random models have more rows than tokens) become unused tokens.

    python -m tools.peers.to_gguf CHECKPOINT OUT.gguf
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

from coppice.models.gguf.architectures import band_factors

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SCALE = "_scale"
PRE_TOKENIZER = "qwen2"
"""llama.cpp's name for the splitting pattern of the bundled tokenizer."""


def write_gguf(folder: Path, out: Path) -> None:
    """Write ``out``, whole or not at all.

    Raises:
        ValueError: the architecture is neither ``llama`` nor ``qwen2``.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ("llama", "qwen2"):
        raise ValueError(f"{config['model_type']} models are not written; only llama and qwen2")
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), config["model_type"])
    _write_config(writer, config)
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(n for n in names if not n.endswith(SCALE)):
            tensor = tensors.get_tensor(name)
            if name + SCALE in names:  # int8 codes, a scale per row
                tensor = tensor.float() * tensors.get_tensor(name + SCALE).float()
            _add(writer, gguf_name(name), _rows_for_llama(name, tensor, config))
        factors = _rope_factors(config)
        if factors is not None:
            _add(writer, "rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)


def gguf_name(name: str) -> str:
    """A tensor's GGUF name: ``model.layers.3.mlp.up_proj.weight`` is ``blk.3.ffn_up.weight``."""
    if name in TOP:
        return TOP[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, role = rest.rpartition(".")
    return f"blk.{layer}.{IN_BLOCK[part]}.{role}"


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]
) -> None:
    count = config["vocab_size"]
    tokens = [f"[PAD{i}]" for i in range(count)]
    types = [gguf.TokenType.UNUSED] * count
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    eos = config.get("eos_token_id")
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos or 0)
    writer.add_add_bos_token(False)


def _rows_for_llama(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """``llama`` keeps each rotary pair in neighbouring rows of queries and keys."""
    heads = {
        ".q_proj.": config["num_attention_heads"],
        ".k_proj.": config["num_key_value_heads"],
    }
    for part, count in heads.items():
        if part in name and config["model_type"] == "llama":
            halves = tensor.reshape(count, 2, _head_dim(config) // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _rope_factors(config: dict[str, Any]) -> Tensor | None:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    band = tuple(
        scaling[key]
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    return torch.tensor(band_factors(config["rope_theta"], _head_dim(config) // 2, band))


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices as BF16, vectors as F32, as llama.cpp's own converter does."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
