"""`Ops` on the CPU through the C++ extension: shapes are checked here, arithmetic is there.

The extension takes addresses. Every tensor whose address is passed is a live local of the
calling method, contiguous, and of the type the kernel expects; `ready` sees to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coppice.errors import EngineError
from coppice.kernels import _native
from coppice.kernels.formats import (
    GROUPS,
    Activations,
    Format,
    Quantized,
    Shapes,
    check_shapes,
    float_format,
)
from coppice.kernels.interface import Activation, QKNorm
from coppice.kernels.native.program import NativeProgram
from coppice.kernels.native.tensors import ACTIVATIONS, QK_NORMS, cache_of, ready
from coppice.kernels.program import DecoderProgram
from coppice.kernels.rows import Rows

LANES = 16
"""Output features of a packed panel; layers are padded to a multiple."""

ARENA_BYTES = 32 << 20
"""Packed weights are laid side by side in huge pages of arenas of this size."""

ALIGNMENT = 64
"""Bytes; one cache line."""

_ROLES = ("data", "scales", "zeros", "bias")
"""The tensors of a packed layer, in the order the extension takes them."""

FILL_ROWS = 512
"""Rows converted at a time while packing a tensor of a foreign type or stride."""

_STORES: dict[tuple[int, Activations], int] = {
    (32, "float"): 0,
    (16, "float"): 1,
    (8, "int8"): 2,
    (4, "int8"): 3,
    (8, "float"): 4,
    (4, "float"): 5,
}
"""`Store` of kernels.h, by bits and activations."""


@dataclass(slots=True)
class NativePacked:
    """A weight in panels of 16 output features, and its bias padded alike.

    Attributes:
        data: floats, ``[ceil(N / 16)][K][16]``, or codes (layouts: native/quantized_table.h).
        scales: of a quantized weight.
        zeros: of a quantized weight with zero points.
        native: the addresses, for the extension; valid as long as this object lives.
    """

    data: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    bias: Tensor | None
    out_features: int
    in_features: int
    format: Format
    native: _native.Packed

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        held = (self.data, self.scales, self.zeros, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class NativeOps:
    """`Ops` by the native CPU kernels."""

    def __init__(self) -> None:
        self.name = f"native {_native.isa()}"
        self.device = torch.device("cpu")
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._last: tuple[Rows, _native.RowArrays] | None = None

    def empty_linear(
        self, out_features: int, in_features: int, format: Format, *, bias: bool = False
    ) -> NativePacked:
        """See `Ops.empty_linear`."""
        shapes = _shapes(out_features, in_features, format, bias=bias)
        tensors = {role: self._zeros(shape[0], dtype) for role, (dtype, shape) in shapes.items()}
        return _pack_of(out_features, in_features, format, tensors)

    def linear_tensors(self, packed: NativePacked) -> dict[str, Tensor]:
        """See `Ops.linear_tensors`."""
        held = {role: getattr(packed, role) for role in _ROLES}
        return {role: tensor for role, tensor in held.items() if tensor is not None}

    def adopt_linear(
        self,
        out_features: int,
        in_features: int,
        format: Format,
        tensors: Mapping[str, Tensor],
    ) -> NativePacked:
        """See `Ops.adopt_linear`."""
        shapes = _shapes(out_features, in_features, format, bias="bias" in tensors)
        check_shapes(tensors, shapes)
        return _pack_of(out_features, in_features, format, tensors)

    def fill_linear(
        self,
        packed: NativePacked,
        row: int,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
    ) -> None:
        """See `Ops.fill_linear`."""
        values = weight.codes if isinstance(weight, Quantized) else weight
        rows, width = values.shape
        if width != packed.in_features or row + rows > packed.out_features:
            raise EngineError(f"A {rows}x{width} part does not fit its layer at row {row}.")
        if isinstance(weight, Quantized):
            _fill_codes(packed, row, weight)
        else:
            _fill_floats(packed, row, weight)
        if bias is not None:
            if packed.bias is None:
                raise EngineError("The layer was made without a bias.")
            packed.bias[row : row + rows].copy_(bias)

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> NativePacked:
        """See `Ops.pack_linear`."""
        packed = self.empty_linear(
            weight.shape[0], weight.shape[1], float_format(weight.dtype), bias=bias is not None
        )
        self.fill_linear(packed, 0, weight, bias)
        return packed

    def unpack_linear(self, packed: NativePacked) -> Tensor:
        """See `Ops.unpack_linear`."""
        out = torch.empty(packed.out_features, packed.in_features)
        _native.unpack(packed.native, out.data_ptr())
        return out if packed.format.quantized else out.to(packed.format.dtype)

    def linear(self, x: Tensor, packed: NativePacked, *, residual: Tensor | None = None) -> Tensor:
        """See `Ops.linear`."""
        x = ready(x)
        rows, width = x.shape
        n = packed.out_features
        if width != packed.in_features:
            raise EngineError(f"{width} features reached a layer that takes {packed.in_features}.")
        residual_address = 0
        if residual is not None:
            residual = ready(residual, rows * n)
            residual_address = residual.data_ptr()
        out = torch.empty(rows, n)
        _native.linear(packed.native, x.data_ptr(), residual_address, out.data_ptr(), rows)
        return out

    def embedding(self, token: Tensor, packed: NativePacked) -> Tensor:
        """See `Ops.embedding`."""
        token = token.to(torch.int32).contiguous()
        out = torch.empty(token.shape[0], packed.in_features)
        _native.gather(packed.native, token.data_ptr(), out.data_ptr(), token.shape[0])
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        """See `Ops.rms_norm`; any leading dims."""
        x = ready(x)
        n = x.shape[-1]
        weight = ready(weight, n)
        out = torch.empty_like(x)
        _native.norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // n, n, eps)
        return out

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
        num_rows, num_kv_heads = rows.num_rows, k_pages.shape[1]
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        qkv = ready(qkv, num_rows * (num_heads + 2 * num_kv_heads) * head_dim)
        cos_sin = ready(cos_sin)
        if qk_norm != "none":
            full = qk_norm == "full"
            assert q_weight is not None
            assert k_weight is not None
            q_weight = ready(q_weight, head_dim * (num_heads if full else 1))
            k_weight = ready(k_weight, head_dim * (num_kv_heads if full else 1))
        half = cos_sin.shape[2]
        if 2 * half > head_dim:
            raise EngineError(f"{2 * half} rotary dims do not fit a head of {head_dim}.")
        q = torch.empty(num_rows, num_heads, head_dim)
        _native.rope(
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            0 if q_weight is None else q_weight.data_ptr(),
            0 if k_weight is None else k_weight.data_ptr(),
            q.data_ptr(),
            cache_of(k_pages, v_pages, head_dim),
            self.row_arrays(rows),
            num_heads,
            half,
            QK_NORMS[qk_norm],
            eps,
            cos_sin.shape[0],
        )
        return q

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
        q = ready(q)
        num_rows, num_heads, head_dim = q.shape
        if num_heads % k_pages.shape[1]:
            raise EngineError(f"{num_heads} query heads do not fit {k_pages.shape[1]} KV heads.")
        if sinks is not None:
            sinks = ready(sinks, num_heads)
        out = torch.empty(num_rows, num_heads * head_dim)
        _native.attention(
            q.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            cache_of(k_pages, v_pages, head_dim),
            self.row_arrays(rows),
            num_heads,
            scale,
            softcap,
            window,
        )
        return out

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """See `Ops.gated_activation`."""
        gate_up = ready(gate_up)
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2)
        _native.gate(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, ACTIVATIONS[kind])
        return out

    def compile(self, decoder: DecoderProgram) -> NativeProgram:
        """See `Ops.compile`."""
        return NativeProgram(decoder, self.row_arrays)

    def _zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """Zeros in huge pages: weights are streamed whole, page walks would cost a quarter.

        Small weights share an arena, which lives as long as one of them does; what nobody took
        of it was never touched and is not resident.
        """
        size_bytes = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if size_bytes > self._arena.numel():
            self._arena = torch.empty(max(ARENA_BYTES, size_bytes), dtype=torch.uint8)
            _native.advise_huge(self._arena.data_ptr(), self._arena.nbytes)
        taken = self._arena[: count * dtype.itemsize]
        self._arena = self._arena[size_bytes:]
        return taken.view(dtype).zero_()

    def row_arrays(self, rows: Rows) -> _native.RowArrays:
        """Addresses of the step's arrays, made once per step (layers share them)."""
        last = self._last  # another thread may be at this with rows of its own
        if last is None or last[0] is not rows:
            tensors = (
                rows.position,
                rows.sequence,
                rows.parent,
                rows.slot,
                rows.page_table,
                rows.prefix_len,
            )
            for tensor in tensors:
                if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                    raise EngineError("Row arrays must be contiguous int32 tensors.")
            sequences, max_pages = rows.page_table.shape
            if rows.prefix_len.shape[0] != sequences:
                raise EngineError("Rows need one prefix length per page table line.")
            if any(t.shape != rows.slot.shape for t in tensors[:3]):
                raise EngineError("Row arrays differ in length.")
            arrays = _native.RowArrays(
                *(tensor.data_ptr() for tensor in tensors), rows.num_rows, sequences, max_pages
            )
            last = self._last = rows, arrays
        return last[1]


def _shapes(out_features: int, in_features: int, format: Format, *, bias: bool) -> Shapes:
    """The tensors of a layer, by role."""
    _check_format(format, in_features)
    padded = -(-out_features // LANES) * LANES
    width = in_features
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if format.quantized:
        count = padded * format.num_groups(in_features)
        shapes["scales"] = (format.scale_dtype, (count,))
        if format.zero_points:
            shapes["zeros"] = (torch.uint8, (count,))
        width = -(-width // format.activation_group) * format.activation_group
        width = width * format.bits // 8
    if bias:
        shapes["bias"] = (torch.float32, (padded,))
    shapes["data"] = (format.dtype, (padded * width,))
    return shapes


def _pack_of(
    out_features: int, in_features: int, format: Format, tensors: Mapping[str, Tensor]
) -> NativePacked:
    """The packed layer that holds ``tensors``."""
    held = [tensors.get(role) for role in _ROLES]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in held)
    native = _native.Packed(
        *addresses,
        out_features,
        in_features,
        format.group,
        _STORES[format.bits, format.activations],
    )
    data, scales, zeros, bias = held
    assert data is not None
    return NativePacked(
        data=data,
        scales=scales,
        zeros=zeros,
        bias=bias,
        out_features=out_features,
        in_features=in_features,
        format=format,
        native=native,
    )


def _check_format(format: Format, in_features: int) -> None:
    """Refuse a format the kernels do not know, or a width its groups do not divide."""
    known = (format.bits, format.activations) in _STORES
    if format.quantized:
        known &= format.group in ((0, *GROUPS) if format.bits == 8 else GROUPS)  # noqa: PLR2004
        known &= not (format.zero_points and format.bits == 8)  # noqa: PLR2004
    if not known:
        raise EngineError(
            f"The native kernels do not know format {format.name}; choose the reference ones."
        )
    if format.group and in_features % format.group:
        raise EngineError(
            f"Format {format.name} needs inputs in groups of {format.group}, "
            f"{in_features} are no multiple of that."
        )


def _fill_floats(packed: NativePacked, row: int, weight: Tensor) -> None:
    """Pack float rows of any type and stride."""
    if packed.format.quantized:
        raise EngineError(f"A layer of format {packed.format.name} takes quantized weights.")
    for first in range(0, weight.shape[0], FILL_ROWS):
        part = weight[first : first + FILL_ROWS].contiguous()
        if part.dtype not in (torch.float32, torch.bfloat16):
            part = part.float()
        is_bf16 = part.dtype == torch.bfloat16
        _native.pack(packed.native, part.data_ptr(), is_bf16, row + first, part.shape[0])


def _fill_codes(packed: NativePacked, row: int, weight: Quantized) -> None:
    """Pack codes, scales (rounded to the stored type) and zero points."""
    codes = weight.codes.contiguous()
    shape = (codes.shape[0], packed.format.num_groups(packed.in_features))
    scales = weight.scales.to(packed.format.scale_dtype).contiguous()
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    fits = codes.dtype == torch.int8 and scales.shape == shape
    if packed.format.zero_points != (zeros is not None):
        fits = False
    if zeros is not None and (zeros.shape != shape or zeros.dtype != torch.int8):
        fits = False
    if not (fits and packed.format.quantized):
        raise EngineError(f"A layer of format {packed.format.name} takes other codes or scales.")
    _native.pack_codes(
        packed.native,
        codes.data_ptr(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        row,
        shape[0],
    )
