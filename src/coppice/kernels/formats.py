"""How a linear layer's weight is stored, and what it is multiplied with.

A quantized weight is ``w[n, k] = scale[n, g] * (code[n, k] - zero[n, g])`` with ``g`` the
group of ``k``. With ``activations == "int8"`` the rows of the batch are quantized too, on
the fly, symmetric, one scale per row and group of `Format.activation_group` inputs; products
are then summed exactly in int32 within a group and groups are added in order in float32, so
the result depends neither on the batch nor on the instruction set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coppice.errors import EngineError

Activations = Literal["float", "int8"]

ACTIVATION_GROUP = 64
"""Inputs per activation scale where the weight has one scale per output channel."""

GROUPS = (32, 64, 128)
"""Group sizes the kernels know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A storage format of linear layers.

    Attributes:
        name: what users write, for example ``"int8"`` or ``"int4-g32"``.
        bits: per weight: 32 and 16 (floats), 8 and 4 (integers).
        group: consecutive inputs that share a scale; 0 for one scale per output channel.
        zero_points: whether groups have a zero point (asymmetric codes).
        activations: ``"float"`` multiplies float rows with the dequantized weight.
    """

    name: str
    bits: Literal[32, 16, 8, 4]
    group: int = 0
    zero_points: bool = False
    activations: Activations = "float"

    @property
    def quantized(self) -> bool:
        """Whether codes and scales are stored instead of floats."""
        return self.bits <= 8  # noqa: PLR2004

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored elements: a float type, or int8 for codes."""
        return {32: torch.float32, 16: torch.bfloat16}.get(self.bits, torch.int8)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Type scales are stored in: groups are many, so theirs are float16."""
        return torch.float16 if self.group else torch.float32

    @property
    def activation_group(self) -> int:
        """Inputs per activation scale."""
        return self.group or ACTIVATION_GROUP

    def num_groups(self, in_features: int) -> int:
        """Scales per output channel."""
        return in_features // self.group if self.group else 1


F32 = Format(name="f32", bits=32)
BF16 = Format(name="bf16", bits=16)


def float_format(dtype: torch.dtype) -> Format:
    """The format that keeps a float tensor: bfloat16 as it is, all else as float32."""
    return BF16 if dtype == torch.bfloat16 else F32


class Quantized(NamedTuple):
    """Rows of a quantized weight, before any packing.

    Attributes:
        codes: ``[n, K]`` int8; -127 to 127 at 8 bits, -8 to 7 at 4 bits without zero points,
            0 to 15 with them.
        scales: ``[n, K / group]`` float32 (``[n, 1]`` per channel).
        zeros: ``[n, K / group]`` int8, 0 to 15; None without zero points.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequant(self) -> Tensor:
        """The float32 ``[n, K]`` weight this stands for."""
        n, k = self.codes.shape
        codes = self.codes.float().view(n, self.scales.shape[1], -1)
        if self.zeros is not None:
            codes = codes - self.zeros.float().unsqueeze(-1)
        return (codes * self.scales.unsqueeze(-1)).view(n, k)


Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of a packed layer's tensors, by role."""


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """What `check_shapes` compares."""
    return {role: (tensor.dtype, tuple(tensor.shape)) for role, tensor in tensors.items()}


def check_shapes(tensors: Mapping[str, Tensor], wanted: Shapes) -> None:
    """Refuse tensors that are not what a layer is made of.

    Raises:
        EngineError: a role is missing or too many, or its type or shape differs.
    """
    found = shapes_of(tensors)
    if found != wanted:
        raise EngineError(f"A layer is made of {dict(wanted)}, not of {dict(found)}.")
