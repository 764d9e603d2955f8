"""Storage formats of weights.

Owns how a weight is stored and applied. Refuses to know what a layer is for. Invariant: a
`Linear` gives the same bits for a row whatever rows stand beside it.

The names below are loaded when first used (PEP 562): `coppice.weights.stored` is read by a
starting engine before PyTorch is there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coppice.kernels.formats import BF16, F32, Format, Quantized
    from coppice.weights.linear import Linear, Part

__all__ = ["BF16", "F32", "Format", "Linear", "Part", "Quantized"]

_LINEAR = ("Linear", "Part")


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'coppice.weights' has no attribute {name!r}")
    home = "coppice.weights.linear" if name in _LINEAR else "coppice.kernels.formats"
    return getattr(import_module(home), name)
