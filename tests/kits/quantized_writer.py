"""Writes checkpoints as GPTQ, AWQ and compressed-tensors store them, word by word.

Written from the formats' public descriptions with plain loops over nibbles, apart from the
readers in `coppice`: what both misread alike would show nowhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grid:
    """A matrix on an integer grid: ``w = scales * (codes - zeros)``, groups by ``group_of``."""

    codes: np.ndarray  # [out, in], 0 .. 2^bits - 1
    zeros: np.ndarray  # [out, groups]
    scales: np.ndarray  # [out, groups] float16
    group_of: np.ndarray  # [in]

    def floats(self) -> np.ndarray:
        scales = self.scales.astype(np.float32)[:, self.group_of]
        return scales * (self.codes - self.zeros[:, self.group_of]).astype(np.float32)


def to_grid(
    weight: np.ndarray, bits: int, group: int, *, symmetric: bool, group_of: np.ndarray
) -> Grid:
    top = 2**bits - 1
    count = int(group_of.max()) + 1
    zeros = np.full((len(weight), count), 2 ** (bits - 1), np.int64)
    scales = np.zeros((len(weight), count), np.float16)
    for g in range(count):
        part = weight[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g] = 2 * np.maximum(-low, high) / top
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 0, top)
    steps = scales.astype(np.float32)[:, group_of]
    codes = np.clip(np.round(weight / steps) + zeros[:, group_of], 0, top).astype(np.int64)
    if bits == 8:
        codes = np.maximum(codes, 1)  # -128 has no place in the kernels; see the docs
    return Grid(codes, zeros, scales, group_of)


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Pack along the last dim, lowest bits first; ``order``: which value each slot holds."""
    per_word = 32 // bits
    columns = -(-values.shape[-1] // per_word)
    packed = np.zeros((*values.shape[:-1], columns), np.uint32)
    for at in range(values.shape[-1]):
        slot = at % per_word if order is None else order.index(at % per_word)
        packed[..., at // per_word] |= values[..., at].astype(np.uint32) << np.uint32(bits * slot)
    return packed.view(np.int32)


def write(folder: Path, out: Path, layout: str, **options: Any) -> Path:
    """Quantize the layers of ``folder`` into ``out``.

    Args:
        folder: ``config.json`` and ``model.safetensors``, floats.
        out: the quantized checkpoint.
        layout: ``gptq``, ``gptq_v2``, ``awq``, ``pack`` or ``int``.
        options: ``bits``, ``group`` (-1: whole width), ``symmetric``, ``act_order``.

    Returns:
        A folder of floats holding exactly what the quantized one stands for.
    """
    bits, group = options.get("bits", 4), options.get("group", 32)
    symmetric = options.get("symmetric", True)
    stored: dict[str, torch.Tensor] = {}
    twin: dict[str, torch.Tensor] = {}
    rng = np.random.default_rng(1)
    orders: dict[int, np.ndarray] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() == 1 or ".layers." not in name or name.endswith("gate.weight"):
            stored[name] = twin[name] = tensor
            continue
        weight = tensor.float().numpy()
        size = weight.shape[1] if group == -1 else group
        group_of = np.arange(weight.shape[1]) // size
        if options.get("act_order"):
            group_of = orders.setdefault(len(group_of), rng.permutation(group_of))
        grid = to_grid(weight, bits, size, symmetric=symmetric, group_of=group_of)
        twin[name] = torch.from_numpy(grid.floats())
        base = name.removesuffix("weight")
        made = _LAYOUTS[layout](grid, bits, symmetric, layout)
        stored |= {base + k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in made.items()}
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization_config": _config(layout, bits, group, options)}
    for place, tensors, made_config in (
        (out, stored, quantized),
        (out.parent / f"{out.name}-twin", twin, config),
    ):
        place.mkdir()
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(made_config))
    return out.parent / f"{out.name}-twin"


def _gptq(grid: Grid, bits: int, symmetric: bool, layout: str) -> dict[str, np.ndarray]:
    zeros = grid.zeros if layout == "gptq_v2" else (grid.zeros - 1) % 2**bits
    return {
        "qweight": words(grid.codes, bits).T,
        "qzeros": words(zeros.T, bits),
        "scales": grid.scales.T,
        "g_idx": grid.group_of.astype(np.int32),
    }


def _awq(grid: Grid, bits: int, symmetric: bool, layout: str) -> dict[str, np.ndarray]:
    return {
        "qweight": words(grid.codes.T, bits, AWQ_ORDER),
        "qzeros": words(grid.zeros.T, bits, AWQ_ORDER),
        "scales": grid.scales.T,
    }


def _pack(grid: Grid, bits: int, symmetric: bool, layout: str) -> dict[str, np.ndarray]:
    made = {
        "weight_packed": words(grid.codes, bits),
        "weight_scale": grid.scales,
        "weight_shape": np.array(grid.codes.shape, np.int64),
    }
    if not symmetric:
        made["weight_zero_point"] = words(grid.zeros.T, bits).T
    if not np.array_equal(grid.group_of, np.sort(grid.group_of)):
        made["weight_g_idx"] = grid.group_of.astype(np.int32)
    return made


def _int(grid: Grid, bits: int, symmetric: bool, layout: str) -> dict[str, np.ndarray]:
    return {"weight": (grid.codes - 128).astype(np.int8), "weight_scale": grid.scales}


_LAYOUTS = {"gptq": _gptq, "gptq_v2": _gptq, "awq": _awq, "pack": _pack, "int": _int}


def _config(layout: str, bits: int, group: int, options: dict[str, Any]) -> dict[str, Any]:
    symmetric = options.get("symmetric", True)
    if layout == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
        }
    if layout.startswith("gptq"):
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": symmetric,
            "desc_act": options.get("act_order", False),
            "checkpoint_format": layout,
        }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{layout}-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": rows if options.get("rows") else None,
            }
        },
    }
