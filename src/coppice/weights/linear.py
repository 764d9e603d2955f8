"""A linear layer that knows how its weight is stored.

Callers see `Linear` only: rows in, rows out. The storage `Format` (float32, bfloat16, int8,
int4) is a property, not a type callers branch on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Activations, Format, Quantized, float_format
from coppice.kernels.interface import Ops, PackedLinear
from coppice.weights.names import with_activations

CODES = {(8, False): (-127, 127), (4, False): (-8, 7), (4, True): (0, 15)}
"""Least and greatest code, by bits and whether there are zero points."""

ZEROS = (0, 15)
"""Least and greatest zero point."""


class Part(NamedTuple):
    """Consecutive output features of a layer: ``weight [n, K]`` and its bias, if any.

    ``order [K]`` says which input feature each column of ``weight`` belongs to, where they do
    not stand in their own order; all parts of a layer have the same.
    """

    weight: Tensor | Quantized
    bias: Tensor | None = None
    order: Tensor | None = None


class Linear:
    """``y = x W^T + b`` for the rows of a batch.

    Build one with `Linear.pack`; the source tensors may be freed afterwards.

    Attributes:
        name: the checkpoint's name of the layer, for messages.
        format: how the weight is stored.
        shape: ``(out_features, in_features)``.
        order: ``[K]`` which input feature each packed column belongs to; None where they
            stand in their own order. Rows are brought into it before they are multiplied.
    """

    __slots__ = ("_ops", "_packed", "format", "name", "order", "shape")

    def __init__(
        self, name: str, format: Format, shape: tuple[int, int], ops: Ops, packed: PackedLinear
    ) -> None:
        self.order: Tensor | None = None
        self.name = name
        self.format = format
        self.shape = shape
        self._ops = ops
        self._packed = packed

    @classmethod
    def pack(
        cls,
        ops: Ops,
        name: str,
        parts: Iterable[Part],
        *,
        shape: tuple[int, int],
        format: Format,
        bias: bool = False,
    ) -> Linear:
        """Pack parts, stacked over output features (q, k, v; gate, up), into one layer.

        ``parts`` may be a generator: one part is read, packed and dropped at a time, so
        loading needs little more memory than the packed layer itself.

        Raises:
            CheckpointError: a part has the wrong shape, does not match the format, or the
                parts do not add up.
        """
        if format.group and shape[1] % format.group:
            raise CheckpointError(
                f"{name}: {shape[1]} inputs do not divide into the groups of {format.group} "
                f"that {format.name} needs; choose a smaller group or int8."
            )
        packed = ops.empty_linear(*shape, format, bias=bias)
        row, order = 0, None
        for part in parts:
            order = _same_order(name, part.order, order, first=row == 0)
            rows = _check(name, part, format=format, room=(shape[0] - row, shape[1]))
            _check_bias(name, part.bias, rows=rows, has_bias=bias)
            ops.fill_linear(packed, row, part.weight, part.bias)
            row += rows
        if row != shape[0]:
            raise CheckpointError(
                f"{name}: its parts have {row} output features where the configuration says "
                f"{shape[0]}; check that config.json belongs to these weights."
            )
        linear = cls(name, format, shape, ops, packed)
        linear.order = None if order is None else order.to(ops.device)
        return linear

    @classmethod
    def from_tensors(
        cls,
        ops: Ops,
        name: str,
        shape: tuple[int, int],
        format: Format,
        tensors: Mapping[str, Tensor],
    ) -> Linear:
        """The layer whose `tensors` these were; they are kept, not copied.

        Raises:
            EngineError: they belong to another shape or format.
        """
        tensors = dict(tensors)
        order = tensors.pop("order", None)
        linear = cls(name, format, shape, ops, ops.adopt_linear(*shape, format, tensors))
        linear.order = order
        return linear

    @classmethod
    def from_tensor(
        cls,
        ops: Ops,
        name: str,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        format: Format | None = None,
    ) -> Linear:
        """Pack one ``[N, K]`` float tensor; ``format`` defaults to its own precision."""
        shape = (weight.shape[0], weight.shape[1])
        format = format or float_format(weight.dtype)
        parts = [Part(weight, bias)]
        return cls.pack(ops, name, parts, shape=shape, format=format, bias=bias is not None)

    def with_activations(self, activations: Activations) -> Linear:
        """The very weight, not a copy, multiplied with other rows; itself where it is floats.

        Packed codes lie the same way whatever they meet, so two layers share them.
        """
        if not self.format.quantized or self.format.activations == activations:
            return self
        form = with_activations(self.format, activations)
        return Linear.from_tensors(self._ops, self.name, self.shape, form, self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight and bias hold."""
        return int(self._packed.nbytes)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All it is made of, by role, in its backend's layout; not copies."""
        order = {} if self.order is None else {"order": self.order}
        return {**self._ops.linear_tensors(self._packed), **order}

    @property
    def packed(self) -> PackedLinear:
        """The weight in its backend's layout, for that backend alone."""
        return self._packed

    @property
    def ops(self) -> Ops:
        """The backend that packed it."""
        return self._ops

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x [T, K]`` float32 to ``[T, N]`` float32, ``residual [T, N]`` added if given."""
        if self.order is not None:
            x = x.index_select(1, self.order)
        return self._ops.linear(x, self._packed, residual=residual)

    def gather(self, token: Tensor) -> Tensor:
        """Rows ``token [T]`` of the weight as float32 ``[T, K]``: a tied embedding."""
        return self._in_order(self._ops.embedding(token, self._packed))

    def dequant(self) -> Tensor:
        """The weight as a new float32 ``[N, K]`` tensor."""
        return self._in_order(self._ops.unpack_linear(self._packed).float())

    def _in_order(self, columns: Tensor) -> Tensor:
        """Packed columns ``[n, K]`` back in the order of input features."""
        return columns if self.order is None else columns[:, torch.argsort(self.order)]

    def __repr__(self) -> str:
        return f"Linear({self.name}, {self.shape[0]}x{self.shape[1]}, {self.format.name})"


def _same_order(
    name: str, order: Tensor | None, before: Tensor | None, *, first: bool
) -> Tensor | None:
    """The one order of a layer's parts."""
    if first or order is before:
        return order
    if order is None or before is None or not torch.equal(order, before):
        raise CheckpointError(
            f"{name}: its parts order their inputs differently ('g_idx'), so they cannot be one "
            "layer; use a checkpoint quantized without 'desc_act'."
        )
    return order


def _check(name: str, part: Part, *, format: Format, room: tuple[int, int]) -> int:
    """Refuse a part that would not fit where it is about to be packed; its output features."""
    weight = part.weight
    values = weight.codes if isinstance(weight, Quantized) else weight
    wanted = f"{name}: expected a [<= {room[0]}, {room[1]}] {format.name} weight"
    if values.dim() != 2 or values.shape[1] != room[1] or values.shape[0] > room[0]:  # noqa: PLR2004
        raise CheckpointError(
            f"{wanted}, found {list(values.shape)}; is config.json of these weights?"
        )
    if isinstance(weight, Quantized) != format.quantized:
        found = "floats; quantize them first" if format.quantized else "integer codes"
        raise CheckpointError(f"{wanted}, found {found} (see `coppice quantize --help`).")
    if isinstance(weight, Quantized):
        problem = _contradiction(weight, format)
        if problem:
            raise CheckpointError(f"{wanted}, but {problem}; is the checkpoint damaged?")
    elif not weight.is_floating_point():
        raise CheckpointError(f"{wanted}, found {weight.dtype}; use a float checkpoint.")
    return values.shape[0]


def _contradiction(weight: Quantized, format: Format) -> str | None:
    """What about a quantized weight does not match its format, in words."""
    codes, scales, zeros = weight
    shape = (codes.shape[0], format.num_groups(codes.shape[1]))
    if codes.dtype != torch.int8:
        return f"its codes are {codes.dtype}, not int8"
    if scales.shape != shape or not scales.is_floating_point():
        return f"its scales are {scales.dtype} {list(scales.shape)}, not float {list(shape)}"
    if (zeros is not None) != format.zero_points:
        return f"its zero points are {'missing' if zeros is None else 'not wanted'}"
    if zeros is not None and (zeros.shape != shape or zeros.dtype != torch.int8):
        return f"its zero points are {zeros.dtype} {list(zeros.shape)}, not int8 {list(shape)}"
    least, most = CODES[format.bits, format.zero_points]
    if not _within(codes, least, most):
        return f"its codes leave the range {least} to {most}"
    if zeros is not None and not _within(zeros, *ZEROS):
        return f"its zero points leave the range {ZEROS[0]} to {ZEROS[1]}"
    if not _within(scales, *(s * torch.finfo(format.scale_dtype).max for s in (-1, 1))):
        return f"its scales are not finite in {format.scale_dtype}"
    return None


def _within(values: Tensor, least: float, most: float) -> bool:
    """Whether all elements lie in a closed range; NaN does not."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return bool(low >= least) and bool(high <= most)


def _check_bias(name: str, bias: Tensor | None, *, rows: int, has_bias: bool) -> None:
    """Refuse a bias that is missing, not expected or not of its weight's length."""
    if (bias is not None) != has_bias or (bias is not None and bias.shape != (rows,)):
        found = "none" if bias is None else str(list(bias.shape))
        raise CheckpointError(
            f"{name}: bias {found} does not match its weight's {rows} output features; "
            "check that config.json belongs to these weights."
        )
