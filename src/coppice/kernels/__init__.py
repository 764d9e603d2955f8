"""Operators over rows: the only room that knows devices and instruction sets.

Owns the arithmetic of a forward pass. Refuses to know models or requests. Invariant: the
reduction order of an output element depends on the layer's shape only (see `interface`).

Importing this package is cheap; PyTorch comes in with `get_ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from coppice.errors import ConfigError

if TYPE_CHECKING:
    from coppice.kernels.interface import Ops

Backend = Literal["native", "reference"]

__all__ = ["Backend", "get_ops"]


def get_ops(device: str = "cpu", prefer: Backend | None = None) -> Ops:
    """The operators for ``device``.

    Args:
        device: a PyTorch device, ``"cpu"`` by default.
        prefer: force one implementation; by default native on a CPU where it was built,
            else the reference.

    Raises:
        ConfigError: ``prefer="native"`` where there is no native implementation.
    """
    from coppice.kernels.reference import ReferenceOps  # noqa: PLC0415

    if prefer == "native":
        raise ConfigError(
            "The native kernels are not built; reinstall coppice with a C++ compiler."
        )
    return ReferenceOps(device)
