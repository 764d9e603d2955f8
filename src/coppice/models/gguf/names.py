"""GGUF tensors under their Hugging Face names, and what undoes the converter's changes.

llama.cpp's converter renames tensors, stacks experts, adds 1 to Gemma's norm weights and,
for ``llama``, reorders query and key rows so that rotary pairs are neighbours. `map_tensors`
says for every Hugging Face name where its values are and which of these to undo.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.gguf.reader import GGUFReader, TensorInfo

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA2 = {
    **_LINEAR,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **_POST_NORM,
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    **_PRE_NORM,
}
_MIXTRAL = {"ffn_gate_inp": "block_sparse_moe.gate"}
_QWEN3MOE = {"ffn_gate_inp": "mlp.gate"}

_LAYERS: dict[str, dict[str, str]] = {
    "llama": {**_LINEAR, **_PRE_NORM},
    "mistral": {**_LINEAR, **_PRE_NORM},
    "mixtral": {**_LINEAR, **_PRE_NORM, **_MIXTRAL},
    "qwen2": {**_LINEAR, **_PRE_NORM},
    "qwen3": {**_LINEAR, **_PRE_NORM, **_HEAD_NORM},
    "qwen3_moe": {**_LINEAR, **_PRE_NORM, **_HEAD_NORM, **_QWEN3MOE},
    "gemma2": _GEMMA2,
    "gemma3_text": {**_GEMMA2, **_HEAD_NORM},
    "phi3": _PHI3,
    "olmo2": {**_LINEAR, **_POST_NORM, **_HEAD_NORM},
}
_EXPERTS: dict[str, tuple[str, dict[str, str]]] = {
    "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": (
        "mlp.experts",
        {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    ),
}
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
_STACKED = re.compile(r"ffn_(gate|up|down)_exps")
_SINGLE_EXPERT = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|up|down)\.(\d{1,5})\.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one Hugging Face tensor is found.

    Attributes:
        info: the stored tensor.
        shape: the Hugging Face shape.
        expert: which slice along the first dimension, for stacked experts.
        rotary_heads: heads whose rows are to be brought back from neighbouring pairs to
            halves; 0 for none.
        offset: subtracted from the values.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    expert: int | None = None
    rotary_heads: int = 0
    offset: float = 0.0


def map_tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Piece]:
    """Every Hugging Face tensor the file holds.

    Args:
        reader: the opened file.
        config: what `coppice.models.gguf.architectures.hf_config` made of it.

    Raises:
        UnsupportedModelError: a tensor has no place in the architecture.
        CheckpointError: an expert or head count does not match a tensor's shape.
    """
    found: dict[str, Piece] = {}
    for info in reader.tensors.values():
        if info.name in _IN_CONFIG:
            continue
        for name, piece in _pieces(info, config):
            if name in found:
                raise CheckpointError(f"Two GGUF tensors stand for {name}; the file is damaged.")
            found[name] = piece
    return found


def _pieces(info: TensorInfo, config: dict[str, Any]) -> list[tuple[str, Piece]]:
    kind = config["model_type"]
    if info.name in _TOP:
        return [(_TOP[info.name], Piece(info, info.shape, offset=_norm_offset(kind, info.name)))]
    single = _SINGLE_EXPERT.fullmatch(info.name)
    if single and kind in _EXPERTS:
        at, names = _EXPERTS[kind]
        layer, part, expert = single.groups()
        name = f"model.layers.{int(layer)}.{at}.{int(expert)}.{names[part]}.weight"
        return [(name, Piece(info, info.shape))]
    block = _BLOCK.fullmatch(info.name)
    if block is None:
        raise _unplaced(info)
    layer, part, role = int(block[1]), block[2], block[3]
    stacked = _STACKED.fullmatch(part)
    if stacked and kind in _EXPERTS:
        return _experts(info, config, layer, stacked[1])
    place = _LAYERS[kind].get(part)
    if place is None:
        raise _unplaced(info)
    piece = Piece(
        info,
        info.shape,
        rotary_heads=_rotary_heads(part, config),
        offset=_norm_offset(kind, info.name),
    )
    if piece.rotary_heads and info.shape[0] % (2 * piece.rotary_heads):
        raise CheckpointError(f"{info.name} has {info.shape[0]} rows, not whole heads of pairs.")
    return [(f"model.layers.{layer}.{place}.{role}", piece)]


def _experts(
    info: TensorInfo, config: dict[str, Any], layer: int, part: str
) -> list[tuple[str, Piece]]:
    count = config.get("num_local_experts", config.get("num_experts"))
    if len(info.shape) != 3 or info.shape[0] != count:  # noqa: PLR2004 - [experts, out, in]
        raise CheckpointError(f"{info.name} has shape {info.shape}; {count} experts are declared.")
    at, names = _EXPERTS[config["model_type"]]
    return [
        (
            f"model.layers.{layer}.{at}.{expert}.{names[part]}.weight",
            Piece(info, info.shape[1:], expert=expert),
        )
        for expert in range(info.shape[0])
    ]


def _rotary_heads(part: str, config: dict[str, Any]) -> int:
    """Only ``llama`` (with Mistral and Mixtral) is stored with rotary pairs as neighbours."""
    if config["model_type"] not in ("llama", "mistral", "mixtral"):
        return 0
    counts = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return int(counts.get(part, 0))


def _norm_offset(kind: str, name: str) -> float:
    return 1.0 if kind.startswith("gemma") and name.endswith("norm.weight") else 0.0


def _unplaced(info: TensorInfo) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"GGUF tensor {info.name[:80]!r} has no place in this architecture; the file needs a "
        "feature that is not built."
    )
