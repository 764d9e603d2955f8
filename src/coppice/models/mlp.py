"""The dense feed-forward part of a layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from coppice.kernels.formats import Activations
from coppice.kernels.interface import Activation, Ops
from coppice.weights import Linear


class FeedForward(Protocol):
    """What follows attention in a layer: one gated layer, or a mixture of them."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x [T, hidden]`` to ``[T, hidden]``, plus ``residual`` if given."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        ...

    def linears(self) -> list[Linear]:
        """Its matrices."""
        ...

    def with_activations(self, activations: Activations) -> FeedForward:
        """The same over the same packed weights; see `Linear.with_activations`."""
        ...


class GatedMLP:
    """``down(act(gate(x)) * up(x))``.

    Args:
        gate_up: ``[2 * intermediate, hidden]``, gate half first.
        down: ``[hidden, intermediate]``.
    """

    __slots__ = ("_activation", "_ops", "down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear, ops: Ops, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self._ops = ops
        self._activation: Activation = activation

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self.gate_up.nbytes + self.down.nbytes

    def linears(self) -> list[Linear]:
        """Its matrices."""
        return [self.gate_up, self.down]

    def with_activations(self, activations: Activations) -> GatedMLP:
        """The same over the same packed weights; see `Linear.with_activations`."""
        gate_up, down = (each.with_activations(activations) for each in self.linears())
        return GatedMLP(gate_up, down, self._ops, self._activation)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x [T, hidden]`` to ``[T, hidden]``, plus ``residual`` if given."""
        inner = self._ops.gated_activation(self.gate_up(x), self._activation)
        return self.down(inner, residual)
