"""A linear layer that knows how its weight is stored.

Callers see `Linear` only: rows in, rows out. The storage kind ("f32", "bf16", later int8,
int4, low-rank) is a property, not a type callers branch on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.interface import Ops, PackedLinear

Kind = Literal["f32", "bf16"]

DTYPES: dict[Kind, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}


class Part(NamedTuple):
    """Consecutive output features of a layer: ``weight [n, K]`` and its bias, if any."""

    weight: Tensor
    bias: Tensor | None = None


class Linear:
    """``y = x W^T + b`` for the rows of a batch.

    Build one with `Linear.pack`; the source tensors may be freed afterwards.

    Attributes:
        name: the checkpoint's name of the layer, for messages.
        kind: how the weight is stored.
        shape: ``(out_features, in_features)``.
    """

    __slots__ = ("_ops", "_packed", "kind", "name", "shape")

    def __init__(
        self, name: str, kind: Kind, shape: tuple[int, int], ops: Ops, packed: PackedLinear
    ) -> None:
        self.name = name
        self.kind = kind
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
        kind: Kind,
        bias: bool = False,
    ) -> Linear:
        """Pack parts, stacked over output features (q, k, v; gate, up), into one layer.

        ``parts`` may be a generator: one part is read, packed and dropped at a time, so
        loading needs little more memory than the packed layer itself.

        Raises:
            CheckpointError: a part has the wrong shape, or the parts do not add up.
        """
        packed = ops.empty_linear(*shape, DTYPES[kind], bias=bias)
        row = 0
        for part in parts:
            _check(name, part, shape=shape, row=row, has_bias=bias)
            ops.fill_linear(packed, row, part.weight, part.bias)
            row += part.weight.shape[0]
        if row != shape[0]:
            raise CheckpointError(
                f"{name}: its parts have {row} output features where the configuration says "
                f"{shape[0]}; check that config.json belongs to these weights."
            )
        return cls(name, kind, shape, ops, packed)

    @classmethod
    def from_tensor(
        cls,
        ops: Ops,
        name: str,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        kind: Kind | None = None,
    ) -> Linear:
        """Pack one ``[N, K]`` tensor; ``kind`` defaults to the tensor's own precision."""
        if kind is None:
            kind = "bf16" if weight.dtype == torch.bfloat16 else "f32"
        shape = (weight.shape[0], weight.shape[1])
        parts = [Part(weight, bias)]
        return cls.pack(ops, name, parts, shape=shape, kind=kind, bias=bias is not None)

    @property
    def nbytes(self) -> int:
        """Bytes the packed weight and bias hold."""
        return int(self._packed.nbytes)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x [T, K]`` float32 to ``[T, N]`` float32, ``residual [T, N]`` added if given."""
        return self._ops.linear(x, self._packed, residual=residual)

    def gather(self, token: Tensor) -> Tensor:
        """Rows ``token [T]`` of the weight as float32 ``[T, K]``: a tied embedding."""
        return self._ops.embedding(token, self._packed)

    def dequant(self) -> Tensor:
        """The weight as a new float32 ``[N, K]`` tensor."""
        return self._ops.unpack_linear(self._packed).float()

    def __repr__(self) -> str:
        return f"Linear({self.name}, {self.shape[0]}x{self.shape[1]}, {self.kind})"


def _check(name: str, part: Part, *, shape: tuple[int, int], row: int, has_bias: bool) -> None:
    """Refuse a part that would not fit where it is about to be packed."""
    weight, bias = part
    wanted = f"{name}: expected a [<= {shape[0] - row}, {shape[1]}] float weight"
    if weight.dim() != 2 or weight.shape[1] != shape[1] or row + weight.shape[0] > shape[0]:  # noqa: PLR2004
        raise CheckpointError(
            f"{wanted}, found {list(weight.shape)}; is config.json of these weights?"
        )
    if not weight.is_floating_point():
        raise CheckpointError(f"{wanted}, found {weight.dtype}; use a float checkpoint.")
    if (bias is not None) != has_bias or (bias is not None and bias.shape != weight.shape[:1]):
        found = "none" if bias is None else str(list(bias.shape))
        raise CheckpointError(
            f"{name}: bias {found} does not match its weight {list(weight.shape)}; "
            "check that config.json belongs to these weights."
        )
