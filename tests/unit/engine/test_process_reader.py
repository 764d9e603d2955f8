"""The engine's end of the socket, when the front end is gone."""

from __future__ import annotations

import queue
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from coppice.engine.messages import Shutdown
from coppice.engine.process import _read


@pytest.mark.parametrize("unread", [b"", b"what it was told and had not read"])
def test_a_front_end_that_is_gone_ends_the_engine_at_once(unread: bytes) -> None:
    """With something unread the system says reset, not end of file."""
    ours, theirs = socket.socketpair()
    ours.sendall(unread)
    theirs.close()
    loop: Any = SimpleNamespace(inbox=queue.SimpleQueue())
    with ours:
        _read(ours, loop)
    assert isinstance(loop.inbox.get_nowait(), Shutdown)
