"""An exception that belongs to one sequence's rows, and what its client is told of it.

What goes wrong inside a step (a native library's panic, a failed allocation, a bug) ends the
sequences it belongs to and nothing else: the others run again, alone or together, which by
batch invariance gives them the tokens they would have had.
"""

from __future__ import annotations

import logging

from coppice.errors import CoppiceError, RowFaultError

log = logging.getLogger("coppice.engine")
Fault = tuple[str, str]
"""A stable code of `coppice.errors`, and a sentence for the client."""
NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Raised to end the program, not by a fault; panics of Rust libraries are no `Exception`."""


def describe(error: BaseException, where: str) -> Fault:
    """What the client is told; the text of a foreign exception goes to the log only.

    Args:
        error: what was raised.
        where: the part of the step, as the sentence's subject.

    Raises:
        BaseException: ``error`` itself, where it is to end the program.
    """
    if isinstance(error, NOT_OURS):
        raise error
    if isinstance(error, CoppiceError):
        return error.code, error.message
    log.error("%s failed", where, exc_info=error)
    why = "failed over this request; the server's log says why"
    if isinstance(error, MemoryError):
        why = "ran out of memory over this request; send a smaller one"
    return RowFaultError.code, f"{where} {why}."
