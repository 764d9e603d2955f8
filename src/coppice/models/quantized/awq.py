"""Checkpoints of AutoAWQ in its GEMM layout.

``qweight`` int32 ``[in, out / 8]`` and ``qzeros`` int32 ``[groups, out / 8]`` pack along the
outputs, each word in the slot order of `coppice.weights.packing.AWQ_SLOTS`; ``scales`` is
``[groups, out]``. Zero points are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coppice.errors import UnsupportedModelError
from coppice.kernels.formats import Quantized
from coppice.models.fields import Fields
from coppice.models.quantized.layout import (
    FLOATS,
    Matrix,
    check_group,
    expect,
    finite_scales,
    kernel_format,
    spread,
)
from coppice.models.safetensors import SafetensorsSource
from coppice.models.source import Codes
from coppice.weights.packing import unpack_awq


@dataclass(frozen=True, slots=True)
class AWQLayout:
    """Settings of an AWQ checkpoint, see the module."""

    group_size: int
    method: str = "awq"

    @classmethod
    def read_config(cls, fields: Fields) -> AWQLayout:
        """From ``quantization_config``."""
        fields.choice_of("bits", (4,))
        version = str(fields.value("version", "gemm")).lower()
        if version != "gemm" or not fields.flag("zero_point", True):
            raise UnsupportedModelError(
                f"AWQ weights in version {version!r} (zero_point "
                f"{fields.value('zero_point', True)}) are not supported; use a checkpoint in "
                "version 'gemm' with zero points."
            )
        group = -1 if fields.value("group_size", 128) == -1 else fields.integer("group_size", 128)
        return cls(group)

    def matrices(self, files: SafetensorsSource) -> list[Matrix]:
        """See `Layout`."""
        return [
            self._matrix(files, name.removesuffix("qweight"))
            for name in files.names()
            if name.endswith(".qweight")
        ]

    def _matrix(self, files: SafetensorsSource, base: str) -> Matrix:
        shape = files.shape(f"{base}qweight")
        expect(files, f"{base}qweight", (shape[0], shape[-1]), ("I32",))
        in_features, words = shape
        group = check_group(self.group_size, in_features, f"{base}qweight")
        groups = in_features // group
        expect(files, f"{base}qzeros", (groups, words), ("I32",))
        expect(files, f"{base}scales", (groups, 8 * words), FLOATS)
        tensors = tuple(f"{base}{part}" for part in ("qweight", "qzeros", "scales"))
        fmt = kernel_format(4, group, in_features, zero_points=True, name=tensors[0])
        return Matrix(base, (8 * words, in_features), group, fmt, tensors)

    def read(self, files: SafetensorsSource, matrix: Matrix) -> Codes:
        """See `Layout`."""
        qweight, qzeros, scales = (files.read_stored(name) for name in matrix.tensors)
        scales = finite_scales(scales, matrix.tensors[2]).t()
        codes = unpack_awq(qweight).t().contiguous().view(torch.int8)
        zeros = unpack_awq(qzeros).t().contiguous().view(torch.int8)
        return Codes(Quantized(codes, spread(scales, matrix), spread(zeros, matrix)))
