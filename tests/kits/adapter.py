"""Writes LoRA adapters for models we made, in the layout of the PEFT library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "v_proj", "down_proj")


def make_adapter(
    folder: Path, base: Path, *, rank: int, alpha: float, seed: int = 0, **settings: Any
) -> Path:
    """Random factors for three matrices of each layer of the model in ``base``."""
    shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if stem.rpartition(".")[2] in TARGETS:
            for end, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                made = torch.randn(size, generator=generator) * 0.1
                factors[f"base_model.model.{stem}.lora_{end}.weight"] = made
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": TARGETS}
    config |= {"bias": "none", "lora_dropout": 0.05, "modules_to_save": None} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
