"""The operators a model is made of, as a protocol.

Two implementations exist: `coppice.kernels.reference` (PyTorch, any device, what tests
compare with) and `coppice.kernels.native` (the C++ extension, CPU). `get_ops` picks one.

Activations are float32. Weights have a `Format`; KV pages are float32 or bfloat16. Every
operator obeys one rule, batch invariance: the reduction order of an output element is a
function of the layer's shape only, never of how many rows stand beside it or how the rows were
chunked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from coppice.kernels.formats import Format, Quantized
from coppice.kernels.rows import Rows

if TYPE_CHECKING:
    from coppice.kernels.program import DecoderProgram, Program

Activation = Literal["silu", "gelu_tanh", "gelu"]
QKNorm = Literal["none", "head", "full"]

PackedLinear = Any
"""Opaque to everyone but the `Ops` that made it."""


class Ops(Protocol):
    """Operators over rows. ``T`` rows, ``H`` heads, ``K`` KV heads, ``D`` head dim."""

    name: str
    device: torch.device
    """Where weights, rows and pages live."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """Bring ``weight [N, K]`` to this backend's layout, in its own precision."""
        ...

    def empty_linear(
        self, out_features: int, in_features: int, format: Format, *, bias: bool = False
    ) -> PackedLinear:
        """Room for a ``[out_features, in_features]`` weight that `fill_linear` fills in parts.

        This is how q, k and v (or gate and up) become one layer without a second copy:
        each part is packed straight into its rows of the one buffer.

        Raises:
            EngineError: groups do not divide the width, or this backend lacks the format.
        """
        ...

    def linear_tensors(self, packed: PackedLinear) -> dict[str, Tensor]:
        """The tensors a packed layer is made of, by role; not copies."""
        ...

    def adopt_linear(
        self,
        out_features: int,
        in_features: int,
        format: Format,
        tensors: Mapping[str, Tensor],
    ) -> PackedLinear:
        """The layer that `linear_tensors` was asked of, from such tensors; not copied.

        Raises:
            EngineError: they are not what a layer of this shape and format is made of.
        """
        ...

    def fill_linear(
        self,
        packed: PackedLinear,
        row: int,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
    ) -> None:
        """Pack ``weight [n, K]`` as output features ``row .. row + n``.

        Float formats take tensors of any float type, quantized ones take `Quantized` (whose
        values the caller has checked); scales are rounded to `Format.scale_dtype`.
        """
        ...

    def unpack_linear(self, packed: PackedLinear) -> Tensor:
        """The weight as computed with, a new ``[N, K]`` tensor.

        In its stored dtype, or float32 ``scale * (code - zero)`` where it is quantized.
        """
        ...

    def linear(self, x: Tensor, packed: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        """``x [T, K] @ weight.T + bias (+ residual)`` as float32 ``[T, N]``.

        Where the format quantizes activations, a NaN or infinity in a row makes that row's
        outputs NaN, and no other's.
        """
        ...

    def embedding(self, token: Tensor, packed: PackedLinear) -> Tensor:
        """Rows of a packed ``[V, hidden]`` matrix as float32 ``[T, hidden]`` (tied heads)."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """``x / rms(x) * weight`` per row; a ``(1 + w)`` norm is folded in at load."""
        ...

    def rope_append(
        self,
        qkv: Tensor,
        rows: Rows,
        k_pages: Tensor,
        v_pages: Tensor,
        cos_sin: Tensor,
        *,
        num_heads: int,
        qk_norm: QKNorm = "none",
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Norm (optional) and rotate q and k, write K and V to their slots, return q.

        Args:
            qkv: ``[T, (H + 2K) * D]`` float32, q heads then k heads then v heads.
            rows: the step's rows.
            k_pages: see `coppice.kernels.pages`; written in place.
            v_pages: likewise.
            cos_sin: ``[max_position, 2, R // 2]`` float32, cosines then sines, for the first
                ``R <= D`` dims of a head in the half-split (Hugging Face) convention.
                ``R == 0`` means no rotation (NoPE layers).
            num_heads: ``H``.
            qk_norm: RMS norm over each head (``head``, weights ``[D]``) or over all heads
                together (``full``, weights ``[H*D]`` and ``[K*D]``), before the rotation.
            q_weight: the norm's weight for q, if there is a norm.
            k_weight: likewise for k.
            eps: the norm's epsilon.

        Returns:
            Rotated q, float32 ``[T, H, D]``.
        """
        ...

    def attention(
        self,
        q: Tensor,
        rows: Rows,
        k_pages: Tensor,
        v_pages: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend each row to its visible slots (see `Rows`); float32 ``[T, H * D]``.

        A row at logical index ``i`` (its number of visible slots minus one) sees logical
        indices ``j`` with ``i - j < window`` when ``window > 0``. ``softcap > 0`` maps a
        scaled logit ``s`` to ``softcap * tanh(s / softcap)``. Accumulation runs over
        logical indices in order, with blocks fixed by logical index alone.
        """
        ...

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """``act(gate) * up`` for ``gate_up [T, 2 * I]`` (gate half first): ``[T, I]``."""
        ...

    def compile(self, decoder: DecoderProgram) -> Program | None:
        """One call for a whole forward pass, or None where this backend has no such thing."""
        ...
