"""Allocations that fail: the k-th tensor, array or KV page asked for raises `MemoryError`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coppice.cache.pages import PageAllocator

ARRAYS = ("array", "arange", "concatenate", "empty", "empty_like", "full", "zeros", "zeros_like")


class Shortage:
    """Counts allocations while it is `begun`, and fails those it is told to.

    Attributes:
        count: allocations since `begin`.
        failed: how many of them were refused.
        where: the line of this project that asked for the first of them.
    """

    def __init__(self) -> None:
        self._first = self._last = 0
        self.count = self.failed = 0
        self.where = ""

    def begin(self, first: int, times: int = 1) -> None:
        """Refuse the ``first``-th allocation from now on (1 is the next) and those behind it."""
        self.count = self.failed = 0
        self._first, self._last = first, first + times

    def end(self) -> None:
        """Refuse no more."""
        self._last = 0

    def ask(self) -> None:
        """An allocation is asked for."""
        self.count += 1
        if self._first <= self.count < self._last:
            if not self.failed:
                ours = [f for f in traceback.extract_stack() if "/src/coppice/" in f.filename]
                if ours:
                    self.where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
            self.failed += 1
            raise MemoryError


class _Tensors(TorchDispatchMode):
    """Every operator that makes a tensor with memory of its own asks first."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__()
        self._shortage = shortage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returns = func._schema.returns
        if any(r.alias_info is None and str(r.type) == "Tensor" for r in returns):
            self._shortage.ask()
        made = func(*args, **(kwargs or {}))
        assert made is None or not isinstance(made, Tensor) or made.device.type == "cpu"
        return made


@contextmanager
def short_of_memory() -> Iterator[Shortage]:
    """Inside, allocations of tensors, arrays and KV pages go through the `Shortage`."""
    shortage = Shortage()

    def asking(real: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            shortage.ask()
            return real(*args, **kwargs)

        return ask

    patches = [mock.patch.object(np, name, asking(getattr(np, name))) for name in ARRAYS]
    patches.append(mock.patch.object(PageAllocator, "alloc", asking(PageAllocator.alloc)))
    for patch in patches:
        patch.start()
    try:
        with _Tensors(shortage):
            yield shortage
    finally:
        for patch in patches:
            patch.stop()
