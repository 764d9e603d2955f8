"""Operators over rows: the only room that knows devices and instruction sets.

Owns the arithmetic of a forward pass. Refuses to know models or requests. Invariant: the
reduction order of an output element depends on the layer's shape only (see `interface`).

Importing this package is cheap; PyTorch comes in with `get_ops`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from coppice.errors import ConfigError
from coppice.kernels.threads import usable_cores

if TYPE_CHECKING:
    from coppice.kernels.interface import Ops

Backend = Literal["native", "reference"]

__all__ = [
    "Backend",
    "Probe",
    "available_isas",
    "describe",
    "expect_work",
    "get_ops",
    "native_available",
    "num_threads",
    "probe",
    "set_isa",
    "set_num_threads",
    "usable_cores",
]

_log = logging.getLogger(__name__)


def native_available() -> bool:
    """Whether the C++ extension was built."""
    return importlib.util.find_spec("coppice.kernels._native") is not None


def get_ops(device: str = "cpu", prefer: Backend | None = None) -> Ops:
    """The operators for ``device``.

    Args:
        device: a PyTorch device, ``"cpu"`` by default.
        prefer: force one implementation; by default native on a CPU where it was built,
            else the reference.

    Raises:
        ConfigError: ``prefer="native"`` where there is no native implementation.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if prefer == "native" and not (on_cpu and native_available()):
        raise ConfigError(
            f"There are no native kernels for {device} in this installation; reinstall coppice "
            "with g++ present, or choose the reference kernels."
        )
    if on_cpu and prefer != "reference":
        if native_available():
            from coppice.kernels.native import NativeOps

            _start_pool()
            _check_isa()
            return NativeOps()
        _warn_slow()
    from coppice.kernels.reference import ReferenceOps

    return ReferenceOps(device)


def num_threads() -> int:
    """Threads the native kernels use, the caller's included; 1 where they are not built."""
    if not native_available():
        return 1
    from coppice.kernels import _native

    _start_pool()
    return _native.num_threads()


def set_num_threads(threads: int | None = None) -> None:
    """Use ``threads`` threads from now on; the machine's usable cores by default.

    Results do not depend on the number.
    """
    wanted = usable_cores() if threads is None else threads
    if wanted < 1:
        raise ConfigError(f"The number of threads must be at least 1, not {wanted}.")
    if native_available():
        from coppice.kernels import _native

        _start_pool()
        _native.set_num_threads(wanted)


def expect_work() -> None:
    """Say that a forward pass follows within some tens of microseconds.

    Threads that have fallen asleep wake up meanwhile instead of when it begins; if nothing
    comes they go back to sleep after 50 us.
    """
    native = _extension()
    if native is not None:
        native.expect_work()


def available_isas() -> list[str]:
    """Instruction sets the native kernels can use here, best first; empty if not built."""
    if not native_available():
        return []
    from coppice.kernels import _native

    return _native.available()


def set_isa(name: str) -> None:
    """Use one of `available_isas` (tests compare them; the best is chosen by default)."""
    if name not in available_isas():
        raise ConfigError(f"This machine cannot run {name}; choose from {available_isas()}.")
    from coppice.kernels import _native

    _check_isa()  # it would choose anew later
    _native.set_isa(name)


def describe() -> str:
    """What `get_ops` gives on the CPU: for example ``"native avx2, 2 threads"``."""
    if not native_available():
        return "reference (PyTorch); native kernels are not built"
    from coppice.kernels import _native

    threads = num_threads()
    return f"native {_native.isa()}, {threads} thread{'s' if threads > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Probe:
    """Measured limits of this machine with the present threads and instruction set.

    Attributes:
        read_bytes_s: bytes per second of streaming reads from memory.
        fma_flop_s: float32 operations per second, a fused multiply-add counting two.
    """

    read_bytes_s: float
    fma_flop_s: float


def probe(size_bytes: int = 256 << 20) -> Probe:
    """Measure memory bandwidth over ``size_bytes`` and peak multiply rate (about 0.5 s).

    Raises:
        ConfigError: the native kernels are not built.
    """
    if not native_available():
        raise ConfigError("Probing needs the native kernels; reinstall coppice with g++ present.")
    import torch

    from coppice.kernels import _native

    _start_pool()
    memory = torch.empty(size_bytes // 4)
    _native.advise_huge(memory.data_ptr(), memory.nbytes)
    memory.fill_(1.0)
    return Probe(
        read_bytes_s=_native.read_probe(memory.data_ptr(), memory.numel(), 5),
        fma_flop_s=_native.fma_probe(2_000_000),
    )


@cache
def _extension() -> Any:
    """The C++ extension, or None where it was not built."""
    return importlib.import_module("coppice.kernels._native") if native_available() else None


@cache
def _start_pool() -> None:
    """Give the pool its threads, once."""
    from coppice.kernels import _native

    _native.set_num_threads(usable_cores())


@cache
def _check_isa() -> None:
    """Make sure, once, that the chosen instruction set computes right here."""
    from coppice.kernels.native.check import choose_isa

    choose_isa()


@cache
def _warn_slow() -> None:
    """Say once that everything will be slow."""
    _log.warning(
        "Native kernels are not built, computing with PyTorch (several times slower); "
        "reinstall coppice with g++ present."
    )
