"""A decoder as data: what `Ops.compile` turns into one call per forward pass.

Only what the operators can do is said here, in their words; `coppice.models.decoder` computes
the same by calling them one after another, and is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coppice.kernels.interface import Activation, PackedLinear, QKNorm
from coppice.kernels.rows import Rows


class Rotation(Protocol):
    """Cosines and sines of positions, filled in as positions are first reached."""

    cos_sin: Tensor
    """``[positions, 2, R // 2]`` float32, see `Ops.rope_append`."""

    def reach(self, positions: int) -> None:
        """Make sure of positions below ``positions``; ``cos_sin`` may be another tensor then."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProgram:
    """One layer. A norm that is None is not there; ``after`` norms come before the sum."""

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    rotation: Rotation
    window: int
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderProgram:
    """Embedding, layers, final norm, head.

    Attributes:
        eps: of every norm.
        embedding_scale: multiplies the embeddings.
    """

    embedding: PackedLinear
    head: PackedLinear
    norm: Tensor
    layers: Sequence[LayerProgram]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Activation
    qk_norm: QKNorm
    eps: float
    attention_scale: float
    attention_softcap: float
    embedding_scale: float


class Program(Protocol):
    """A compiled decoder."""

    def __call__(self, rows: Rows, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor]) -> Tensor:
        """Write the rows' K and V into the layers' pages, compute the wanted logits.

        Pages are looked at once: the same first tensor means the same pages. So are rows:
        the same object means the same arrays, whatever numbers are in them by now.

        Returns:
            ``[W, V]`` float32, bit for bit what the operators give one by one.
        """
        ...

    def greedy(
        self, rows: Rows, k_pages: Sequence[Tensor], v_pages: Sequence[Tensor], vocab_size: int
    ) -> list[int]:
        """The same, but of each wanted row only the largest logit's token is told.

        Returns:
            ``W`` token ids below ``vocab_size``, the first of equals; or ``-fault`` with the
            codes of `coppice.kernels.sampling`: what sampling the logits would have given.
        """
        ...
