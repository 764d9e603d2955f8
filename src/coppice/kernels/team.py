"""A team: threads apart from the process's own, for some threads' native kernels."""

from __future__ import annotations

from types import TracebackType

from coppice.errors import ConfigError
from coppice.kernels import native_available


class Team:
    """Threads on which the native kernels of whoever enters it run, until it leaves.

    Results do not depend on it. Teams nest; several threads in one team take turns.

    Args:
        num_threads: the caller's included.

    Raises:
        ConfigError: the native kernels are not built, or there is not one thread.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ConfigError(f"A team needs at least 1 thread, not {num_threads}.")
        if not native_available():
            raise ConfigError("Teams are of native kernels; reinstall coppice with g++ present.")
        from coppice.kernels import _native

        self._native = _native.Team(num_threads)

    def __enter__(self) -> None:
        self._native.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._native.leave()
