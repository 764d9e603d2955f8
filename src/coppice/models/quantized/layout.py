"""What the readers of quantized checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.kernels.formats import GROUPS, Activations, Format
from coppice.models.fields import Fields, short
from coppice.models.safetensors import SafetensorsSource
from coppice.models.source import Codes
from coppice.weights.names import integer_format


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear weight that a checkpoint stores as codes.

    Attributes:
        base: name of the layer with its dot: ``model.layers.0.mlp.down_proj.``.
        shape: of the float weight, ``[out, in]``.
        group: inputs per stored scale.
        format: what it is loaded as; its groups may be parts of the stored ones.
        tensors: names of the stored tensors.
    """

    base: str
    shape: tuple[int, int]
    group: int
    format: Format
    tensors: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Stored scales per output feature."""
        return self.shape[1] // self.group


class Layout(Protocol):
    """One way of storing quantized matrices."""

    @property
    def method(self) -> str:
        """Its name in ``quantization_config``."""
        ...

    def matrices(self, files: SafetensorsSource) -> list[Matrix]:
        """Every quantized matrix, after comparing its tensors with the configuration.

        Raises:
            CheckpointError: they contradict each other; the tensor is named.
        """
        ...

    def read(self, files: SafetensorsSource, matrix: Matrix) -> Codes:
        """Unpack one matrix."""
        ...


def kernel_format(
    bits: Literal[8, 4],
    group: int,
    in_features: int,
    *,
    zero_points: bool = False,
    activations: Activations = "float",
    name: str,
) -> Format:
    """The format that holds groups of ``group``: the same, or an exact part of it.

    Raises:
        UnsupportedModelError: no group size the kernels know divides ``group``.
    """
    if bits == 8 and group == in_features:  # noqa: PLR2004
        return integer_format(8, 0, activations=activations)
    for known in sorted(GROUPS, reverse=True):
        if group % known == 0:
            return integer_format(bits, known, zero_points=zero_points, activations=activations)
    raise UnsupportedModelError(
        f"{short(name)} has groups of {group} inputs; multiples of {min(GROUPS)} are supported."
    )


def read_bits(fields: Fields, key: str, *, symmetric: bool) -> Literal[8, 4]:
    """Bits per weight: 4, or 8 where codes are symmetric."""
    return 8 if fields.choice_of(key, (4, 8) if symmetric else (4,)) == 8 else 4  # noqa: PLR2004


def without_least(codes: Tensor) -> Tensor:
    """8-bit codes with -128 turned into -127, the least the kernels know.

    A scale that spans 255 steps puts a group's extreme weight at -127.5: both codes are equally
    far from it.
    """
    return codes.clamp(min=-127).to(torch.int8)


def spread(values: Tensor, matrix: Matrix) -> Tensor:
    """Stored ``[out, groups]`` values repeated for the format's smaller groups."""
    if not matrix.format.group:
        return values.contiguous()
    return values.repeat_interleave(matrix.group // matrix.format.group, 1).contiguous()


def check_group(group: int, in_features: int, name: str) -> int:
    """The group size of a matrix, ``-1`` meaning its whole width.

    Raises:
        CheckpointError: groups do not divide the width.
    """
    group = in_features if group == -1 else group
    if group < 1 or in_features % group:
        raise CheckpointError(
            f"{short(name)} has {in_features} inputs, which groups of {group} do not divide; "
            "is quantization_config of these weights?"
        )
    return group


def expect(
    files: SafetensorsSource, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]
) -> None:
    """Check that a tensor is there, of this shape and one of these stored types.

    Raises:
        CheckpointError: it is not; the message names it and what was expected.
    """
    try:
        found, kind = files.shape(name), files.stored_kind(name)
    except KeyError:
        raise CheckpointError(
            f"Tensor {short(name)} is missing, which quantization_config asks for; the "
            "checkpoint is incomplete or config.json belongs to another."
        ) from None
    if found != shape or kind not in kinds:
        raise CheckpointError(
            f"Tensor {short(name)} is {kind} {list(found)} where quantization_config asks for "
            f"{' or '.join(kinds)} {list(shape)}; do they belong together?"
        )


FLOATS = ("F16", "BF16", "F32")


def finite_scales(scales: Tensor, name: str) -> Tensor:
    """Float32 scales.

    Raises:
        CheckpointError: one is infinite or undefined.
    """
    if not torch.isfinite(scales).all():
        raise CheckpointError(f"Tensor {short(name)} holds scales that are not finite.")
    return scales.float()
