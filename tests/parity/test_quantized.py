"""Quantized checkpoints against transformers running the floats they stand for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coppice.cache.pool import KVPool
from coppice.kernels import get_ops
from coppice.kernels.rows import Rows
from coppice.models.load import LoadedModel, load_model
from tests.kits.quantized_writer import write
from tests.parity.toys import HEADS, MOE, TIED, UNTIED, reference

transformers = pytest.importorskip("transformers")

WIDE = {**HEADS[1], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**WIDE, **UNTIED}),
    "qwen2": ("qwen2", {**WIDE, **TIED}),  # biases on q, k, v
    "phi3": ("phi3", {**WIDE}),  # fused matrices
    "mixtral": ("mixtral", {**WIDE, **MOE}),
}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq-32": ("gptq", {"group": 32}, "int4-g32-weight-only"),
    "gptq-128": ("gptq", {"group": 128}, "int4-g128-weight-only"),
    "gptq-whole": ("gptq", {"group": -1}, "int4-g128-weight-only"),
    "gptq-asymmetric": ("gptq", {"group": 64, "symmetric": False}, "int4-g64-zp-weight-only"),
    "gptq-v2": ("gptq_v2", {"group": 32, "symmetric": False}, "int4-g32-zp-weight-only"),
    "gptq-8": ("gptq", {"group": 64, "bits": 8}, "int8-g64-weight-only"),
    "gptq-act-order": ("gptq", {"group": 32, "act_order": True}, "int4-g32-weight-only"),
    "awq": ("awq", {"group": 64, "symmetric": False}, "int4-g64-zp-weight-only"),
    "pack": ("pack", {"group": 32}, "int4-g32-weight-only"),
    "pack-asymmetric": ("pack", {"group": 64, "symmetric": False}, "int4-g64-zp-weight-only"),
    "pack-order": ("pack", {"group": 32, "act_order": True}, "int4-g32-weight-only"),
    "pack-8": ("pack", {"group": -1, "bits": 8}, "int8-weight-only"),
    "int": ("int", {"group": -1, "bits": 8}, "int8-weight-only"),
    "int-rows": ("int", {"group": -1, "bits": 8, "rows": True}, "int8"),
}


def save(name: str, folder: Path) -> Path:
    family, settings = MODELS[name]
    reference(family, copy.deepcopy(settings), seed=7).save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    pool = KVPool(model.decoder.kv_layout(16), 8)
    return model.decoder.forward(Rows.chunk(tokens, list(range(8))), pool)


@torch.inference_mode()
def expected(twin: Path, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager"
    )
    found: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    assert found.std() > 0.05, "the toy says the same everywhere: the test would be blind"
    return found


TOKENS = [3 + 7 * i % 200 for i in range(60)]


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, dtype="float32", ops=get_ops(prefer="reference"), **options)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_floats(case: str, tmp_path: Path) -> None:
    layout, options, name = CASES[case]
    twin = write(save("llama", tmp_path / "hf"), tmp_path / "q", layout, **options)
    model = load(tmp_path / "q")
    assert model.quantization == name
    want = expected(twin, TOKENS)
    error = (logits(model, TOKENS) - want).abs().max()
    assert error < (0.1 * want.std() if case == "int-rows" else 2e-4)


@pytest.mark.parametrize("model", ["qwen2", "phi3", "mixtral"])
@pytest.mark.parametrize("layout", ["gptq", "awq", "pack"])
def test_stacked_parts_biases_and_experts(model: str, layout: str, tmp_path: Path) -> None:
    options = {"group": 64, "symmetric": layout != "awq"}
    twin = write(save(model, tmp_path / "hf"), tmp_path / "q", layout, **options)
    found = load(tmp_path / "q")
    assert found.quantization is not None
    assert (logits(found, TOKENS) - expected(twin, TOKENS)).abs().max() < 2e-4


def test_weights_stay_small(tmp_path: Path) -> None:
    twin = write(save("llama", tmp_path / "hf"), tmp_path / "q", "gptq", group=32)
    layers = [
        load(folder).decoder.weights.layers[0].mlp.nbytes for folder in (tmp_path / "q", twin)
    ]
    assert layers[0] < 0.3 * layers[1]


def test_the_same_bits_may_change_their_activations(tmp_path: Path) -> None:
    twin = write(save("llama", tmp_path / "hf"), tmp_path / "q", "awq", group=32, symmetric=False)
    model = load(tmp_path / "q", quantization="int4")
    assert model.quantization == "int4-g32-zp"
    assert model.decoder.weights.head.format.name == "int8"
    want = expected(twin, TOKENS)
    difference = (logits(model, TOKENS) - want).abs().max()
    assert 1e-4 < difference < 0.1 * want.std()


def test_inputs_ordered_differently_by_parts_of_a_layer_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from coppice.errors import CheckpointError

    write(save("llama", tmp_path / "hf"), tmp_path / "q", "gptq", group=32, act_order=True)
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj.*g_idx"):
        load(tmp_path / "q")


def test_old_gptq_folders_keep_their_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    write(save("llama", tmp_path / "hf"), tmp_path / "q", "gptq", group=32)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"], settings["checkpoint_format"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "q").quantization == "int4-g32-weight-only"
