"""A decoder's packed weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from coppice.kernels.formats import Activations
from coppice.models.mlp import FeedForward
from coppice.weights import Linear


@dataclass(slots=True, kw_only=True)
class LayerWeights:
    """One layer's packed weights; norms are float32 with any ``(1 + w)`` folded in."""

    qkv: Linear
    output: Linear
    mlp: FeedForward
    before_attention: Tensor | None = None
    after_attention: Tensor | None = None
    before_mlp: Tensor | None = None
    after_mlp: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def with_activations(self, activations: Activations) -> LayerWeights:
        """The same over the same packed weights; see `Linear.with_activations`."""
        return replace(
            self,
            qkv=self.qkv.with_activations(activations),
            output=self.output.with_activations(activations),
            mlp=self.mlp.with_activations(activations),
        )


@dataclass(slots=True, kw_only=True)
class DecoderWeights:
    """All weights; ``head`` is ``embedding`` where they are tied."""

    embedding: Linear
    layers: list[LayerWeights]
    norm: Tensor
    head: Linear

    @property
    def nbytes(self) -> int:
        """Bytes held, tied matrices counted once."""
        total = self.embedding.nbytes + self.norm.nbytes
        total += 0 if self.head is self.embedding else self.head.nbytes
        for layer in self.layers:
            parts = [getattr(layer, name) for name in layer.__slots__]
            total += sum(part.nbytes for part in parts if part is not None)
        return int(total)

    def formats(self) -> dict[str, int]:
        """How many of the layers' weights are in each format, by its name."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for linear in (layer.qkv, layer.output, *layer.mlp.linears()):
                name = linear.format.name
                found[name] = found.get(name, 0) + linear.shape[0] * linear.shape[1]
        return found

    def with_activations(self, activations: Activations) -> DecoderWeights:
        """The same over the same packed weights; see `Linear.with_activations`."""
        embedding = self.embedding.with_activations(activations)
        tied = self.head is self.embedding
        return replace(
            self,
            embedding=embedding,
            layers=[layer.with_activations(activations) for layer in self.layers],
            head=embedding if tied else self.head.with_activations(activations),
        )
