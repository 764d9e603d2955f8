"""What this machine gives at the moment: read bandwidth and peak arithmetic rates.

Virtual machines change by a third within minutes (see the two states of bandwidth in
`docs/howto/compare.md`), so limits are measured beside every figure that is judged by them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from coppice.kernels import get_ops
from coppice.kernels.threads import usable_cores

SIZE_BYTES = 256 << 20
MATMUL_SIZE = 1024


@dataclass(frozen=True)
class Peaks:
    """Arithmetic rates with all cores, a multiply-add counting two.

    Attributes:
        fp32: fused multiply-adds on float32, in registers.
        matmul: PyTorch's square product, the better of float32 and bfloat16.
        int8: products of int8 summed in int32, in registers; ``None`` where the kernels
            have no probe for it.
    """

    fp32: float
    matmul: float
    int8: float | None

    @property
    def bf16(self) -> float:
        """What bf16 weights can be multiplied with: float32 where nothing faster is known."""
        return max(self.fp32, self.matmul)


class Prober:
    """Holds the memory it reads, so that a probe takes a tenth of a second.

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

    def read_bytes_s(self) -> float:
        """Bytes per second of reading memory that no cache holds."""
        return self._native.read_probe(self._memory.data_ptr(), self._memory.numel(), 5)

    def peaks(self) -> Peaks:
        """About a second."""
        int8_probe = getattr(self._native, "int8_probe", None)
        fp32 = statistics.median(self._native.fma_probe(1_000_000) for _ in range(3))
        int8 = None
        if int8_probe is not None:
            int8 = statistics.median(int8_probe(1_000_000) for _ in range(3))
        rates = [matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)]
        return Peaks(fp32, max(rates), int8)


def matmul_rate(dtype: torch.dtype, size: int = MATMUL_SIZE) -> float:
    """Operations per second of PyTorch's ``[size, size]`` product; gives up after 0.3 s."""
    a = torch.rand(size, size).to(dtype)
    b = torch.rand(size, size).to(dtype)
    seconds: list[float] = []
    a @ b
    while len(seconds) < 5 and sum(seconds) < 0.3:
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(seconds)
