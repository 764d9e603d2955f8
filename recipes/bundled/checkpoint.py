"""Atomic training checkpoints: one safetensors file, numbers in its metadata."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Progress:
    """Where a training run stands.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen.
        elapsed_s: seconds of training so far, all runs together.
        cursor: windows taken per ``source:length``.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    cursor: dict[str, int] = field(default_factory=dict)


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress
) -> None:
    """Write the checkpoint beside ``path`` and rename it into place."""
    tensors = {f"model|{k}": v for k, v in weights.items()}
    tensors |= {f"optim|{k}": v for k, v in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, partial, {"progress": json.dumps(asdict(progress))})
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Progress]:
    """Return weights, optimiser tensors and progress; restore torch's random state."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        for key in list(file.keys()):
            kind, _, name = key.partition("|")
            if kind == "rng":
                torch.set_rng_state(file.get_tensor(key))
            else:
                (weights if kind == "model" else moments)[name] = file.get_tensor(key)
    return weights, moments, progress
