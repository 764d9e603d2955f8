"""What calibration keeps of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.weights import Linear


class InputStatistics:
    """Sums over the rows ``x`` a layer was given.

    Attributes:
        hessian: ``[K, K]`` float32, the sum of ``x x^T``.
        total: ``[K]`` the sum of ``|x|``.
        count: rows seen.
    """

    def __init__(self, in_features: int) -> None:
        self.hessian = torch.zeros(in_features, in_features)
        self.total = torch.zeros(in_features)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in rows ``[T, K]``."""
        self.hessian.addmm_(x.t(), x)
        self.total += x.abs().sum(0)
        self.count += x.shape[0]

    @property
    def magnitude(self) -> Tensor:
        """``[K]`` mean absolute input."""
        return self.total / max(self.count, 1)


class RecordedLinear(Linear):
    """A linear layer that notes its inputs while it computes."""

    __slots__ = ("statistics",)

    def __init__(self, inner: Linear) -> None:
        super().__init__(inner.name, inner.format, inner.shape, inner.ops, inner.packed)
        self.statistics = InputStatistics(inner.shape[1])

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's own output."""
        self.statistics.add(x)
        return super().__call__(x, residual)
