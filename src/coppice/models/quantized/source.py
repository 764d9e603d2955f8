"""A quantized checkpoint as a source of tensors under their float names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.kernels.formats import Format
from coppice.models.fields import Fields, short
from coppice.models.quantized.awq import AWQLayout
from coppice.models.quantized.compressed import CompressedLayout
from coppice.models.quantized.gptq import GPTQLayout
from coppice.models.quantized.layout import Layout, Matrix
from coppice.models.safetensors import SafetensorsSource
from coppice.models.source import Codes
from coppice.weights.names import SCHEMES, with_activations

NAME_KEY = "coppice_quantization"
"""In config.json: a name of `coppice.weights.names`, which says what rows are multiplied as."""

LAYOUTS: dict[str, Callable[[Fields], Layout]] = {
    "gptq": GPTQLayout.read_config,
    "awq": AWQLayout.read_config,
    "compressed-tensors": CompressedLayout.read_config,
}
"""Readers by ``quant_method``."""


def open_quantized(
    files: SafetensorsSource, settings: Any, name: str | None = None
) -> QuantizedSource:
    """Read ``quantization_config`` and check every quantized tensor against it.

    Args:
        files: the checkpoint's tensors.
        settings: the object from ``config.json``.
        name: what ``config.json`` says under `NAME_KEY`, if it does.

    Raises:
        UnsupportedModelError: a method, or a setting of it, that is not built.
        CheckpointError: settings and tensors contradict each other.
    """
    if not isinstance(settings, Mapping):
        raise CheckpointError("config.json needs an object under 'quantization_config'.")
    fields = Fields(settings, where="quantization_config")
    method = fields.value("quant_method", "gptq" if "bits" in settings else None)
    if not isinstance(method, str) or method not in LAYOUTS:
        raise UnsupportedModelError(
            f"The checkpoint is quantized with {short(method)}; supported are: "
            f"{', '.join(LAYOUTS)} and GGUF files. Use one of these, or a float checkpoint with "
            "--quantization."
        )
    source = QuantizedSource(files, LAYOUTS[method](fields))
    return source if name is None else source.named(name)


class QuantizedSource:
    """Float tensors as they are, quantized matrices as ``x.weight``.

    Args:
        files: the checkpoint's tensors.
        layout: how the quantized ones are stored.
    """

    def __init__(self, files: SafetensorsSource, layout: Layout) -> None:
        self._files = files
        self._layout = layout
        self._matrices: dict[str, Matrix] = {}
        hidden: set[str] = set()
        for matrix in layout.matrices(files):
            self._matrices[f"{matrix.base}weight"] = matrix
            hidden.update(matrix.tensors)
        if not self._matrices:
            raise CheckpointError(
                f"config.json says the weights are quantized with {layout.method}, but no tensor "
                "is; remove 'quantization_config' if they are floats."
            )
        self._floats = [name for name in files.names() if name not in hidden]
        twice = next((name for name in self._floats if name in self._matrices), None)
        if twice is not None:
            raise CheckpointError(f"Tensor {short(twice)} is stored both as floats and as codes.")
        sizes: dict[str, int] = {}
        for matrix in self._matrices.values():
            name = matrix.format.name
            sizes[name] = sizes.get(name, 0) + math.prod(matrix.shape)
        self.format = f"{layout.method}/{max(sizes, key=lambda name: sizes[name])}"

    def named(self, name: str) -> QuantizedSource:
        """This source, its rows multiplied as the named quantization says.

        Raises:
            CheckpointError: there is no such name, or it is of other weights.
        """
        known = SCHEMES.get(name)
        for at, matrix in self._matrices.items():
            bits = matrix.format.bits
            if known is None or known.layers.bits != bits:
                raise CheckpointError(
                    f"config.json sets {NAME_KEY!r} to {short(name)}, but {short(at)} has {bits} "
                    "bits; remove the key, or write the checkpoint anew."
                )
            fmt = with_activations(matrix.format, known.layers.activations)
            self._matrices[at] = dataclasses.replace(matrix, format=fmt)
        return self

    def names(self) -> Iterable[str]:
        """All tensor names; a quantized matrix counts as one ``x.weight``."""
        return [*self._floats, *self._matrices]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``, as floats."""
        matrix = self._matrices.get(name)
        return self._files.shape(name) if matrix is None else matrix.shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``, dequantized where it is stored as codes."""
        if name not in self._matrices:
            return self._files.read(name, dtype)
        rows, order = self.read_codes(name)
        weight = rows.dequant()
        if order is not None:
            weight = weight[:, torch.argsort(order)]
        return weight.to(dtype)

    def stored_format(self, name: str) -> Format | None:
        """The format of a quantized matrix, None for floats."""
        matrix = self._matrices.get(name)
        return None if matrix is None else matrix.format

    def read_codes(self, name: str) -> Codes:
        """A quantized matrix as it is stored."""
        return self._layout.read(self._files, self._matrices[name])

    def release(self, name: str) -> None:
        """Nothing to do: a read tensor lives in the caller's memory alone."""

    def native_dtype(self) -> torch.dtype:
        """What the float tensors are."""
        return self._files.native_dtype(self._floats)

    def fingerprint(self) -> str:
        """SHA-256 over headers and sampled content."""
        return self._files.fingerprint()

    def close(self) -> None:
        """Close the files."""
        self._files.close()
