"""Other spellings of the same checkpoints: wrappers, shards, old keys, expert layouts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from coppice.kernels import get_ops
from coppice.models.load import load_model
from tests.parity.test_models import TOLERANCE, prompt, run
from tests.parity.toys import COMMON, HEADS, TOYS, WIDE, longrope, reference


def toy(family: str, index: int) -> Any:
    return reference(family, copy.deepcopy(TOYS[family][index]), seed=50 + index)


def edit_config(folder: Path, drop: tuple[str, ...], **changes: Any) -> None:
    path = folder / "config.json"
    found = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**found, **changes}))


@torch.inference_mode()
def distance(theirs: Any, folder: Path, length: int = 100, **options: Any) -> float:
    """Largest difference of logits over a prompt."""
    tokens = prompt(11, length)
    expected = theirs(torch.tensor([tokens])).logits[0].float()
    ours = load_model(folder, **options)
    return float((run(ours.decoder, tokens, 40) - expected).abs().max())


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_both_backends(tmp_path: Path, family: str, backend: Any) -> None:
    theirs = toy(family, 1)
    theirs.save_pretrained(tmp_path)
    ops = get_ops(prefer=backend)
    assert distance(theirs, tmp_path, dtype="float32", ops=ops) < TOLERANCE


def test_gemma3_image_and_text_checkpoint(tmp_path: Path) -> None:
    text = {**COMMON, **TOYS["gemma3_text"][1]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(4)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    theirs.float().eval().save_pretrained(tmp_path)
    assert distance(theirs, tmp_path, dtype="float32") < TOLERANCE


def test_longrope_within_the_original_context(tmp_path: Path) -> None:
    theirs = reference("phi3", {**HEADS[1], **longrope(6), "tie_word_embeddings": False}, seed=5)
    theirs.save_pretrained(tmp_path)
    short = distance(theirs, tmp_path, dtype="float32", max_context=128)
    assert short < TOLERANCE
    # Served beyond the original length, the same short prompt uses the long factors.
    assert distance(theirs, tmp_path, dtype="float32", max_context=129) > 10 * TOLERANCE


def test_shards(tmp_path: Path) -> None:
    theirs = toy("qwen3", 0)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert distance(theirs, tmp_path, dtype="float32") < TOLERANCE


def test_old_spelling_of_rope(tmp_path: Path) -> None:
    theirs = toy("llama", 1)
    theirs.save_pretrained(tmp_path)
    law = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta = law.pop("rope_theta")
    law["type"] = law.pop("rope_type")
    edit_config(tmp_path, ("rope_parameters",), rope_theta=theta, rope_scaling=law)
    assert distance(theirs, tmp_path, dtype="float32") < TOLERANCE


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mixtral", ("block_sparse_moe", "w1", "w3", "w2")),
        ("qwen3_moe", ("mlp", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_apart_and_in_one_tensor(
    tmp_path: Path, family: str, names: tuple[str, str, str, str]
) -> None:
    theirs = toy(family, 0)
    block, gate, up, down = names
    together: dict[str, torch.Tensor] = {}
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            base = name.replace(".mlp.", f".{block}.").removesuffix(".gate_up_proj")
            for i, expert in enumerate(tensor):
                first, second = expert.chunk(2)
                apart[f"{base}.{i}.{gate}.weight"] = first.contiguous()
                apart[f"{base}.{i}.{up}.weight"] = second.contiguous()
        elif name.endswith("experts.down_proj"):
            base = name.replace(".mlp.", f".{block}.").removesuffix(".down_proj")
            apart |= {f"{base}.{i}.{down}.weight": e.clone() for i, e in enumerate(tensor)}
        else:
            apart[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
        together[name] = tensor
    assert len(apart) > len(together)
    for layout in (apart, together):
        theirs.config.save_pretrained(tmp_path)
        save_file(layout, tmp_path / "model.safetensors")
        assert distance(theirs, tmp_path, dtype="float32") < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_bfloat16_weights(tmp_path: Path, family: str) -> None:
    """Same weights, float32 arithmetic, KV in bfloat16: close to the all-float32 reference."""
    theirs = toy(family, 0).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    widened = theirs.float()
    if family == "gemma2":  # it rounds the scale of embeddings to the weights' dtype
        scale = widened.model.embed_tokens.embed_scale
        scale.copy_(scale.to(torch.bfloat16))
    with torch.inference_mode():
        spread = float(widened(torch.tensor([prompt(11)])).logits.std())
    assert distance(widened, tmp_path) < 0.1 * spread


def test_window_as_long_as_the_context_is_no_window(tmp_path: Path) -> None:
    theirs = reference("mistral", {**WIDE[1], "sliding_window": 512}, seed=9)
    theirs.save_pretrained(tmp_path)
    assert distance(theirs, tmp_path, dtype="float32") < TOLERANCE
