"""Where tensors come from: what a checkpoint file looks like to the model loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coppice.kernels.formats import Format, Quantized


class Codes(NamedTuple):
    """A matrix as its checkpoint stores it.

    Attributes:
        rows: codes and scales.
        order: ``[K]`` which input feature each column of ``rows`` belongs to; None where
            they stand in their own order.
    """

    rows: Quantized
    order: Tensor | None = None


class TensorSource(Protocol):
    """Named tensors of one checkpoint, under Hugging Face names and shapes.

    The loader reads tensor after tensor and never holds two copies of the weights, so an
    implementation hands out views or fresh tensors but keeps no cache of its own. Every
    fault found in the file raises `coppice.errors.CheckpointError`.
    """

    format: str
    """How the weights are stored, for people: ``"safetensors/bfloat16"``, ``"gguf/Q4_K"``."""

    def names(self) -> Iterable[str]:
        """All tensor names, such as ``model.layers.0.self_attn.q_proj.weight``."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The Hugging Face shape of ``name`` (a linear weight is ``[out, in]``).

        Raises:
            KeyError: there is no such tensor.
        """
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype`` (float32 or bfloat16), contiguous.

        The result may be a read-only view of a mapped file: callers copy before writing.

        Raises:
            KeyError: there is no such tensor.
        """
        ...

    def stored_format(self, name: str) -> Format | None:
        """The integer format ``name`` is stored in without loss; None for floats."""
        ...

    def read_codes(self, name: str) -> Codes:
        """The matrix as codes, where `stored_format` names a format.

        Raises:
            KeyError: it has none.
        """
        ...

    def release(self, name: str) -> None:
        """Say that ``name`` was consumed, so that pages it occupied may leave memory."""
        ...

    def native_dtype(self) -> torch.dtype:
        """The dtype ``"auto"`` stands for: float32 or bfloat16, whichever loses nothing."""
        ...

    def fingerprint(self) -> str:
        """A stable hex digest of names, shapes, dtypes and sampled content."""
        ...

    def close(self) -> None:
        """Unmap the files. Tensors read before stay valid only if the caller copied them."""
        ...
