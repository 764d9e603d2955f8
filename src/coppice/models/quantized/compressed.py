"""Checkpoints of compressed-tensors: ``int-quantized`` and ``pack-quantized``.

``int-quantized`` keeps codes as an int8 ``weight [out, in]``; ``pack-quantized`` packs codes
plus half their range along the inputs into an int32 ``weight_packed [out, in * bits / 32]``
beside a ``weight_shape [2]``. ``weight_scale`` is ``[out, groups]`` (``[out, 1]`` per
channel, ``[1]`` per tensor). Asymmetric weights have ``weight_zero_point [out, groups]``, packed
along the outputs in ``pack-quantized``; ``weight_g_idx [in]`` names inputs' groups where they
were taken by falling energy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.kernels.formats import Activations, Quantized
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

MAX_MODULE = 200
MAX_REPEATS = 4
"""Patterns come with the checkpoint: what they may repeat is kept small enough to match fast."""

FORMATS = ("int-quantized", "naive-quantized", "pack-quantized")


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """One entry of ``config_groups``."""

    targets: tuple[str, ...]
    bits: Literal[8, 4]
    symmetric: bool
    strategy: str
    group_size: int
    activations: Activations

    def covers(self, module: str) -> bool:
        """Whether a module's weights are described here."""
        return any(_matches(target, module) for target in self.targets)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module[:MAX_MODULE]) is not None
    return target in ("Linear", module) or module.endswith("." + target)


@dataclass(frozen=True, slots=True)
class CompressedLayout:
    """Settings of a compressed-tensors checkpoint, see the module."""

    schemes: tuple[WeightScheme, ...]
    method: str = "compressed-tensors"

    @classmethod
    def read_config(cls, fields: Fields) -> CompressedLayout:
        """From ``quantization_config``."""
        _check_format(fields.value("format", "int-quantized"))
        groups = fields.value("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise fields.wrong("config_groups", groups, "an object with at least one group")
        if fields.value("kv_cache_scheme"):
            raise UnsupportedModelError(
                "quantization_config sets 'kv_cache_scheme', which is not supported; use a "
                "checkpoint whose KV cache stays float."
            )
        return cls(tuple(_scheme(name, group) for name, group in groups.items()))

    def matrices(self, files: SafetensorsSource) -> list[Matrix]:
        """See `Layout`."""
        found = []
        for name in files.names():
            if name.endswith(".weight_packed"):
                found.append(self._matrix(files, name.removesuffix("weight_packed"), packed=True))
            elif name.endswith(".weight") and files.stored_kind(name) == "I8":
                found.append(self._matrix(files, name.removesuffix("weight"), packed=False))
        return found

    def _scheme_of(self, base: str) -> WeightScheme:
        module = base.removesuffix(".")
        for scheme in self.schemes:
            if scheme.covers(module):
                return scheme
        raise CheckpointError(
            f"No group of quantization_config describes {short(module)}, whose weights are "
            "quantized; is config.json of these weights?"
        )

    def _matrix(self, files: SafetensorsSource, base: str, *, packed: bool) -> Matrix:
        scheme = self._scheme_of(base)
        weight = f"{base}weight_packed" if packed else f"{base}weight"
        tensors = [weight, f"{base}weight_scale"]
        shape = files.shape(weight)
        if packed:
            shape = _declared_shape(files, f"{base}weight_shape")
            tensors.append(f"{base}weight_shape")
            words = -(-shape[1] * scheme.bits // 32)
            expect(files, weight, (shape[0], words), ("I32",))
        elif scheme.bits != 8 or len(shape) != 2:  # noqa: PLR2004
            raise CheckpointError(
                f"Tensor {short(weight)} is I8 {list(shape)} where quantization_config asks for "
                f"{scheme.bits} bits; do they belong together?"
            )
        group = check_group(scheme.group_size, shape[1], weight)
        groups = shape[1] // group
        scales = files.shape(f"{base}weight_scale") if f"{base}weight_scale" in files else ()
        single = scheme.strategy == "tensor" and scales in ((), (1,))
        expect(files, f"{base}weight_scale", scales if single else (shape[0], groups), FLOATS)
        if not scheme.symmetric:
            rows = -(-shape[0] * scheme.bits // 32) if packed else shape[0]
            kinds = ("I32",) if packed else ("I8",)
            expect(files, f"{base}weight_zero_point", (rows, groups), kinds)
        for extra in ("weight_zero_point", "weight_g_idx"):
            if f"{base}{extra}" in files:
                tensors.append(f"{base}{extra}")
        fmt = kernel_format(
            scheme.bits,
            group,
            shape[1],
            zero_points=not scheme.symmetric,
            activations=scheme.activations,
            name=weight,
        )
        return Matrix(base, (shape[0], shape[1]), group, fmt, tuple(tensors))

    def read(self, files: SafetensorsSource, matrix: Matrix) -> Codes:
        """See `Layout`."""
        base, scheme = matrix.base, self._scheme_of(matrix.base)
        middle = 1 << (scheme.bits - 1)
        stored = files.read_stored(matrix.tensors[0])
        if matrix.tensors[0].endswith("weight_packed"):
            stored = unpack(stored, scheme.bits)[:, : matrix.shape[1]].short() - middle
        codes = without_least(stored)
        order = None
        if f"{base}weight_g_idx" in matrix.tensors:
            group_of = files.read_stored(f"{base}weight_g_idx")
            order = grouped_order(group_of, matrix.group, f"{base}weight_g_idx")
            codes = codes if order is None else codes[:, order]
        scales = finite_scales(files.read_stored(f"{base}weight_scale"), f"{base}weight_scale")
        scales = scales.expand(matrix.shape[0], matrix.groups)
        if scheme.symmetric:
            return Codes(Quantized(codes.contiguous(), spread(scales, matrix)), order)
        zeros = self._zeros(files, matrix, scheme) + 8
        rows = Quantized(
            (codes + 8).contiguous(), spread(scales, matrix), spread(zeros.to(torch.int8), matrix)
        )
        return Codes(rows, order)

    def _zeros(self, files: SafetensorsSource, matrix: Matrix, scheme: WeightScheme) -> Tensor:
        """Zero points ``[out, groups]`` int16, centred as the codes are."""
        zeros = files.read_stored(f"{matrix.base}weight_zero_point")
        if zeros.dtype == torch.int8:
            return zeros.short()
        columns = unpack(zeros.t(), scheme.bits)[:, : matrix.shape[0]]  # [groups, out]
        return columns.t().short() - (1 << (scheme.bits - 1))


def _declared_shape(files: SafetensorsSource, name: str) -> tuple[int, int]:
    expect(files, name, (2,), ("I64", "I32"))
    rows, columns = (int(size) for size in files.read_stored(name))
    if rows < 1 or columns < 1:
        raise CheckpointError(f"Tensor {short(name)} says [{rows}, {columns}]; it is damaged.")
    return rows, columns


def _check_format(found: Any) -> None:
    if found not in (*FORMATS, "mixed-precision"):
        raise UnsupportedModelError(
            f"quantization_config sets 'format' to {short(found)}; supported are: "
            f"{', '.join(FORMATS)}."
        )


def _scheme(name: str, group: Any) -> WeightScheme:
    """One config group.

    Raises:
        UnsupportedModelError: it asks for something that is not built.
    """
    where = f"quantization_config group {short(name)}"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"{where} lacks an object under 'weights'.")
    if group.get("format") is not None:
        _check_format(group["format"])
    weights = Fields(group["weights"], where=f"{where} ('weights')")
    weights.choice("type", {"int": "int"}, "int")
    symmetric = weights.flag("symmetric", True)
    bits = read_bits(weights, "num_bits", symmetric=symmetric)
    strategy = weights.value("strategy") or ("group" if group.get("group_size") else "channel")
    if strategy not in ("channel", "group", "tensor"):
        raise UnsupportedModelError(
            f"{where} uses strategy {short(strategy)}; supported are channel, group and tensor."
        )
    size = weights.integer("group_size") if strategy == "group" else -1
    targets = group.get("targets") or ["Linear"]
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise CheckpointError(f"{where} lists targets {short(targets)}; names are needed.")
    for target in targets:
        if target.startswith("re:"):
            _check_pattern(target[3:], where)
    activations = _activations(group.get("input_activations"), where)
    return WeightScheme(tuple(targets), bits, symmetric, strategy, size, activations)


def _check_pattern(pattern: str, where: str) -> None:
    try:
        if sum(map(pattern.count, "*+{")) > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
            raise ValueError
        re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError):
        raise CheckpointError(
            f"{where} has the pattern {short(pattern)}, which is invalid or repeats too much."
        ) from None


def _activations(raw: Any, where: str) -> Activations:
    """Rows stay floats, or become int8 with scales made as they come."""
    if not raw:
        return "float"
    if isinstance(raw, Mapping):
        kind = (raw.get("type", "int"), raw.get("num_bits"), raw.get("symmetric", True))
        if kind == ("int", 8, True) and raw.get("dynamic") is True:
            return "int8"
    raise UnsupportedModelError(
        f"{where} quantizes activations as {short(raw)}; supported are none, and dynamic "
        "symmetric int8."
    )
