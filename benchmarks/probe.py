"""What this machine gives at the moment: read bandwidth and peak arithmetic rates.

Virtual machines change by a third within minutes, so limits are measured beside every figure
that is judged by them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coppice.kernels import get_ops
from coppice.kernels.threads import usable_cores

SIZE_BYTES = 256 << 20
FMA_ROUNDS = 400_000
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Limits:
    """Rates with all cores at one moment; a multiply-add counts two.

    Attributes:
        read_bytes_s: bytes per second of reading memory that no cache holds.
        fp32: fused multiply-adds on float32, in registers.
        matmul: PyTorch's square product, in float32 or bfloat16, whichever is faster here.
        int8: products of int8 summed in int32, in registers; ``None`` where the kernels
            have no probe for it.
    """

    read_bytes_s: float
    fp32: float
    matmul: float
    int8: float | None = None

    @property
    def bf16(self) -> float:
        """The fastest rate known for bf16 weights: float32's where bf16 is emulated."""
        return max(self.fp32, self.matmul)


def median_limits(limits: Sequence[Limits]) -> Limits:
    """The median of each rate."""
    int8 = [each.int8 for each in limits if each.int8 is not None]
    return Limits(
        statistics.median(each.read_bytes_s for each in limits),
        statistics.median(each.fp32 for each in limits),
        statistics.median(each.matmul for each in limits),
        statistics.median(int8) if int8 else None,
    )


class Prober:
    """Holds the memory it reads, so that a probe takes a fifth of a second.

    Raises:
        ConfigError: the native kernels are not built.
    """

    def __init__(self) -> None:
        get_ops("cpu", prefer="native")  # starts the threads
        from coppice.kernels import _native

        self._native = _native
        self._memory = torch.empty(SIZE_BYTES // 4)
        _native.advise_huge(self._memory.data_ptr(), self._memory.nbytes)
        self._memory.fill_(1.0)
        torch.set_num_threads(usable_cores())
        self._dtype = max((torch.float32, torch.bfloat16), key=lambda d: _matmul_rate(d, 1))

    def limits(self) -> Limits:
        """Measure all rates once."""
        int8_probe = getattr(self._native, "int8_probe", None)
        return Limits(
            self._native.read_probe(self._memory.data_ptr(), self._memory.numel(), 4),
            self._native.fma_probe(FMA_ROUNDS),
            _matmul_rate(self._dtype),
            None if int8_probe is None else int8_probe(FMA_ROUNDS),
        )


def _matmul_rate(dtype: torch.dtype, samples: int = 3) -> float:
    size = MATMUL_SIZE
    a = torch.ones(size, size).to(dtype)
    b = torch.ones(size, size).to(dtype)
    a @ b
    seconds = []
    for _ in range(samples):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(seconds)
