"""Checkpoints of AutoGPTQ and GPTQModel.

``qweight`` int32 ``[in * bits / 32, out]`` packs codes along the inputs, ``qzeros`` int32
``[groups, out * bits / 32]`` zero points along the outputs, ``scales`` is ``[groups, out]``
and ``g_idx`` ``[in]`` names each input's group. Format version 1 stores a zero point minus
one (modulo its range), version 2 as it is. A quantizer that took inputs by falling energy
leaves a ``g_idx`` that does not ascend: the inputs are then brought in order of their group,
and the layer permutes its rows the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from coppice.errors import CheckpointError
from coppice.kernels.formats import Quantized
from coppice.models.fields import Fields, short
from coppice.models.quantized.layout import (
    FLOATS,
    Matrix,
    check_group,
    expect,
    finite_scales,
    kernel_format,
    read_bits,
    spread,
    without_least,
)
from coppice.models.safetensors import SafetensorsSource
from coppice.models.source import Codes
from coppice.weights.packing import grouped_order, unpack


@dataclass(frozen=True, slots=True)
class GPTQLayout:
    """Settings of a GPTQ checkpoint, see the module."""

    bits: Literal[8, 4]
    group_size: int
    symmetric: bool
    zero_offset: int
    method: str = "gptq"

    @classmethod
    def read_config(cls, fields: Fields) -> GPTQLayout:
        """From ``quantization_config`` (or an old ``quantize_config.json``)."""
        group = -1 if fields.value("group_size") == -1 else fields.integer("group_size")
        symmetric = fields.flag("sym", True)
        bits = read_bits(fields, "bits", symmetric=symmetric)
        version = fields.choice("checkpoint_format", {"gptq": 1, "gptq_v2": 0}, "gptq")
        return cls(bits, group, symmetric, version)

    def matrices(self, files: SafetensorsSource) -> list[Matrix]:
        """See `Layout`."""
        return [
            self._matrix(files, name.removesuffix("qweight"))
            for name in files.names()
            if name.endswith(".qweight")
        ]

    def _matrix(self, files: SafetensorsSource, base: str) -> Matrix:
        per_word = 32 // self.bits
        shape = files.shape(f"{base}qweight")
        expect(files, f"{base}qweight", (shape[0], shape[-1]), ("I32",))
        in_features, out_features = shape[0] * per_word, shape[1]
        group = check_group(self.group_size, in_features, f"{base}qweight")
        groups = in_features // group
        expect(files, f"{base}qzeros", (groups, -(-out_features // per_word)), ("I32",))
        expect(files, f"{base}scales", (groups, out_features), FLOATS)
        tensors = [f"{base}qweight", f"{base}qzeros", f"{base}scales"]
        if f"{base}g_idx" in files:
            expect(files, f"{base}g_idx", (in_features,), ("I32", "I64"))
            tensors.append(f"{base}g_idx")
        fmt = kernel_format(
            self.bits,
            group,
            in_features,
            zero_points=not self.symmetric,
            name=f"{base}qweight",
        )
        return Matrix(base, (out_features, in_features), group, fmt, tuple(tensors))

    def read(self, files: SafetensorsSource, matrix: Matrix) -> Codes:
        """See `Layout`."""
        base, middle = matrix.base, 1 << (self.bits - 1)
        codes = unpack(files.read_stored(f"{base}qweight").t(), self.bits)  # [out, in]
        zeros = unpack(files.read_stored(f"{base}qzeros"), self.bits)[:, : matrix.shape[0]]
        zeros = ((zeros.short() + self.zero_offset) % (2 * middle)).t()  # [out, groups]
        scales = finite_scales(files.read_stored(f"{base}scales"), f"{base}scales").t()
        order = None
        if f"{base}g_idx" in matrix.tensors:
            group_of = files.read_stored(f"{base}g_idx")
            order = grouped_order(group_of, matrix.group, f"{base}g_idx")
            codes = codes if order is None else codes[:, order]
        if not self.symmetric:
            rows = Quantized(
                codes.view(torch.int8).contiguous(),
                spread(scales, matrix),
                spread(zeros.to(torch.int8), matrix),
            )
            return Codes(rows, order)
        if not bool((zeros == middle).all()):
            raise CheckpointError(
                f"Tensor {short(base + 'qzeros')} holds zero points other than {middle} though "
                "quantization_config says the weights are symmetric ('sym'); one of them is wrong."
            )
        centred = without_least(codes.short() - middle)
        return Codes(Quantized(centred.contiguous(), spread(scales, matrix)), order)
