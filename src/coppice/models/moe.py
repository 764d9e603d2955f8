"""A mixture of experts as the feed-forward part of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.kernels.formats import Activations
from coppice.models.config import ExpertSpec
from coppice.models.mlp import GatedMLP
from coppice.weights import Linear


class ExpertMixture:
    """Each row goes through its ``top_k`` best experts; their outputs are added, weighted.

    An expert runs once over the rows that chose it. A row's sum runs over its experts in
    ascending order whatever the other rows chose, so its result does not depend on them.

    Sources: Shazeer et al. (2017); Jiang et al., Mixtral of Experts (2024).

    Args:
        router: ``[num_experts, hidden]``.
        experts: one feed-forward each.
        spec: how many there are and how many a row visits.
    """

    __slots__ = ("_experts", "_router", "_spec")

    def __init__(self, router: Linear, experts: list[GatedMLP], spec: ExpertSpec) -> None:
        self._router = router
        self._experts = experts
        self._spec = spec

    @property
    def experts(self) -> list[GatedMLP]:
        """The experts, in their order."""
        return self._experts

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._router.nbytes + sum(expert.nbytes for expert in self._experts)

    def linears(self) -> list[Linear]:
        """Its matrices, the router's first."""
        return [self._router, *(linear for expert in self._experts for linear in expert.linears())]

    def with_activations(self, activations: Activations) -> ExpertMixture:
        """The same over the same packed weights; see `Linear.with_activations`."""
        experts = [expert.with_activations(activations) for expert in self._experts]
        return ExpertMixture(self._router.with_activations(activations), experts, self._spec)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x [T, hidden]`` to ``[T, hidden]``, plus ``residual`` if given."""
        share, chosen = self.route(x)  # [T, top_k] each
        share, chosen = share.flatten(), chosen.flatten()
        order = torch.argsort(chosen, stable=True)  # choices by expert, then by row
        counts = torch.bincount(chosen, minlength=self._spec.count).tolist()
        out = torch.zeros_like(x)
        picks = zip(self._experts, torch.split(order, counts), strict=True)
        for expert, picked in picks:
            if picked.shape[0]:
                rows = picked // self._spec.top_k  # no row twice: its experts are distinct
                y = expert(x.index_select(0, rows)) * share[picked, None]
                out.index_add_(0, rows, y)
        return out if residual is None else residual + out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (float32) and indices of each row's experts, both ``[T, top_k]``."""
        odds = torch.softmax(self._router(x), dim=-1)
        share, chosen = torch.topk(odds, self._spec.top_k, dim=-1)
        if self._spec.renormalize:
            total = share[:, 0]
            for i in range(1, self._spec.top_k):  # in order: `sum` may block by batch size
                total = total + share[:, i]
            share = share / total[:, None]
        return share, chosen
