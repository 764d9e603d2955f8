"""Every operator in plain PyTorch: what tests compare with, and the fallback anywhere.

Written to be obviously right rather than fast. Batch invariance is kept by never letting
a library see a batch-dependent shape: matrix products run in fixed tiles of rows, padded
with zeros, and attention runs one row at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coppice.kernels import quantized_reference as quantized
from coppice.kernels.formats import (
    Format,
    Quantized,
    check_shapes,
    float_format,
    shapes_of,
)
from coppice.kernels.interface import Activation, QKNorm
from coppice.kernels.pages import page_size_of, read_keys, read_values, write_keys, write_values
from coppice.kernels.program import DecoderProgram
from coppice.kernels.rows import Rows

ROW_TILE = 16
"""Rows per matrix product; a BLAS picks its reduction order by shape, so this is fixed."""


@dataclass(slots=True)
class ReferencePacked:
    """A weight as it came, ``[N, K]``, bias ``[N]`` float32.

    Attributes:
        weight: in its stored float type, or codes, scales and zeros.
    """

    weight: Tensor | Quantized
    bias: Tensor | None
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return sum(tensor.nbytes for tensor in (*held, self.bias) if tensor is not None)

    def dequant(self) -> Tensor:
        """The float32 ``[N, K]`` weight."""
        if isinstance(self.weight, Quantized):
            return self.weight.dequant()
        return self.weight.float()


class ReferenceOps:
    """`Ops` in PyTorch on one device; float32 arithmetic throughout.

    Args:
        device: where weights and rows live, for example ``"cpu"`` or ``"cuda:0"``.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.name = f"reference {self.device.type}"

    def empty_linear(
        self, out_features: int, in_features: int, format: Format, *, bias: bool = False
    ) -> ReferencePacked:
        """See `Ops.empty_linear`."""
        weight: Tensor | Quantized
        if format.quantized:
            weight = quantized.empty(out_features, in_features, format, self.device)
        else:
            shape = (out_features, in_features)
            weight = torch.zeros(shape, dtype=format.dtype, device=self.device)
        bias_row = torch.zeros(out_features, device=self.device) if bias else None
        return ReferencePacked(weight, bias_row, format)

    def linear_tensors(self, packed: ReferencePacked) -> dict[str, Tensor]:
        """See `Ops.linear_tensors`."""
        weight = packed.weight
        parts = weight._asdict() if isinstance(weight, Quantized) else {"weight": weight}
        return {k: v for k, v in {**parts, "bias": packed.bias}.items() if v is not None}

    def adopt_linear(
        self,
        out_features: int,
        in_features: int,
        format: Format,
        tensors: Mapping[str, Tensor],
    ) -> ReferencePacked:
        """See `Ops.adopt_linear`."""
        packed = self.empty_linear(out_features, in_features, format, bias="bias" in tensors)
        check_shapes(tensors, shapes_of(self.linear_tensors(packed)))
        weight: Tensor | Quantized
        if format.quantized:
            weight = Quantized(tensors["codes"], tensors["scales"], tensors.get("zeros"))
        else:
            weight = tensors["weight"]
        return ReferencePacked(weight, tensors.get("bias"), format)

    def fill_linear(
        self,
        packed: ReferencePacked,
        row: int,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
    ) -> None:
        """See `Ops.fill_linear`."""
        held = packed.weight
        if isinstance(held, Quantized):
            assert isinstance(weight, Quantized), "a quantized layer takes quantized weights"
            quantized.fill(held, row, weight)
        else:
            assert isinstance(weight, Tensor), "a float layer takes float weights"
            held[row : row + weight.shape[0]].copy_(weight)
        if bias is not None:
            assert packed.bias is not None, "the layer was made without a bias"
            packed.bias[row : row + bias.shape[0]].copy_(bias)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> ReferencePacked:
        """See `Ops.pack_linear`."""
        n, k = weight.shape
        packed = self.empty_linear(n, k, float_format(weight.dtype), bias=bias is not None)
        self.fill_linear(packed, 0, weight, bias)
        return packed

    def unpack_linear(self, packed: ReferencePacked) -> Tensor:
        """See `Ops.unpack_linear`."""
        weight = packed.weight
        return weight.dequant() if isinstance(weight, Quantized) else weight.clone()

    def linear(
        self, x: Tensor, packed: ReferencePacked, *, residual: Tensor | None = None
    ) -> Tensor:
        """See `Ops.linear`."""
        if isinstance(packed.weight, Quantized) and packed.format.activations == "int8":
            out = quantized.linear(x, packed.weight, packed.format)
        else:
            weight = packed.dequant()  # [N, K]
            padded = F.pad(x, (0, 0, 0, -x.shape[0] % ROW_TILE))
            tiles = [F.linear(tile, weight) for tile in torch.split(padded, ROW_TILE)]
            out = torch.cat([x.new_empty(0, weight.shape[0]), *tiles])[: x.shape[0]]
        if packed.bias is not None:
            out = out + packed.bias
        return out if residual is None else out + residual

    def embedding(self, token: Tensor, packed: ReferencePacked) -> Tensor:
        """See `Ops.embedding`."""
        held, at = packed.weight, token.long()
        if not isinstance(held, Quantized):
            return held[at].float()
        zeros = None if held.zeros is None else held.zeros[at]
        return Quantized(held.codes[at], held.scales[at], zeros).dequant()

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()

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
        """See `Ops.rope_append`."""
        kv_heads = k_pages.shape[1]
        head_dim = qkv.shape[1] // (num_heads + 2 * kv_heads)
        sizes = [num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = torch.split(qkv, sizes, -1)
        if qk_norm == "full":
            assert q_weight is not None and k_weight is not None
            q, k = self.rms_norm(q, q_weight, eps=eps), self.rms_norm(k, k_weight, eps=eps)
        q = torch.unflatten(q, -1, (num_heads, head_dim))  # [T, H, D]
        k = torch.unflatten(k, -1, (kv_heads, head_dim))  # [T, K, D]
        if qk_norm == "head":
            assert q_weight is not None and k_weight is not None
            q, k = self.rms_norm(q, q_weight, eps=eps), self.rms_norm(k, k_weight, eps=eps)
        tables = cos_sin[rows.position.long()]  # [T, 2, R // 2]
        q, k = _rotate(q, tables), _rotate(k, tables)
        slot, page_size = rows.slot.long(), page_size_of(k_pages)
        page = rows.page_table[rows.sequence.long(), slot // page_size].long()
        write_keys(k_pages, page, slot % page_size, k)
        v = torch.unflatten(v, -1, (kv_heads, head_dim))  # [T, K, D]
        write_values(v_pages, page, slot % page_size, v)
        return q.contiguous()

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
        """See `Ops.attention`."""
        out = torch.empty_like(q)
        page_size, head_dim = page_size_of(k_pages), q.shape[2]
        for row, (sequence, slots) in enumerate(visible_slots(rows)):
            slot = torch.tensor(slots[-window:] if window > 0 else slots, device=q.device)
            page = rows.page_table[sequence, slot // page_size].long()
            k = read_keys(k_pages, page, slot % page_size, head_dim)  # [n, K, D]
            v = read_values(v_pages, page, slot % page_size, head_dim)
            out[row] = _attend(q[row] * scale, k, v, softcap, sinks)
        return out.flatten(1)

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """See `Ops.gated_activation`."""
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up

    def compile(self, decoder: DecoderProgram) -> None:
        """See `Ops.compile`: the reference is the operators one by one."""


def visible_slots(rows: Rows) -> list[tuple[int, list[int]]]:
    """Per row: its sequence and the slots it may attend to, oldest first, its own last."""
    sequence, parent = rows.sequence.tolist(), rows.parent.tolist()
    slot, prefix = rows.slot.tolist(), rows.prefix_len.tolist()
    visible: list[tuple[int, list[int]]] = []
    for row, above in enumerate(parent):
        seen = visible[above][1] if above >= 0 else list(range(prefix[sequence[row]]))
        visible.append((sequence[row], [*seen, slot[row]]))
    return visible


def _rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Half-split rotation of the first ``R`` dims of ``x [T, heads, D]``."""
    half = tables.shape[-1]
    if half == 0:
        return x
    cos, sin = tables[:, None, 0], tables[:, None, 1]  # [T, 1, R // 2]
    first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, softcap: float, sinks: Tensor | None) -> Tensor:
    """One row: scaled ``q [H, D]`` over ``k, v [n, K, D]``, each KV head serving a group."""
    kv_heads = k.shape[1]
    grouped = torch.unflatten(q, 0, (kv_heads, -1))  # [K, G, D]
    logits = grouped @ k.permute(1, 2, 0).contiguous()  # [K, G, n]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:  # a learned logit per head that takes mass and gives no value
        logits = torch.cat([logits, sinks.float().view(kv_heads, -1, 1)], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[0]]
    return (weights.contiguous() @ v.transpose(0, 1).contiguous()).flatten(0, 1)
