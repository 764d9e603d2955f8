"""AdamW, and its tensors as a flat table for checkpoints."""

import torch
from torch import Tensor, nn

Moments = dict[str, Tensor]


def make_optimiser(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW; matrices decay, norm weights do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)


def export_moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> Moments:
    """Return every optimiser tensor as ``<weight name>|<moment name>``."""
    names = {p: n for n, p in model.named_parameters()}
    return {
        f"{names[p]}|{key}": value
        for p, state in optimiser.state.items()
        for key, value in state.items()
    }


def import_moments(model: nn.Module, optimiser: torch.optim.Optimizer, moments: Moments) -> None:
    """Put back what :func:`export_moments` returned."""
    named = dict(model.named_parameters())
    for name, value in moments.items():
        weight, key = named[name.split("|")[0]], name.split("|")[1]
        optimiser.state[weight][key] = value.to(weight.device if value.dim() else "cpu").clone()
