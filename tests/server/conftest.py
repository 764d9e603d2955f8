"""Servers over the scripted engine: one shared by the whole session, others on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits.server import ServerProcess


@pytest.fixture(scope="session")
def shared_server(fake_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess(fake_model, fake={"step_s": 0.002}) as server:
        yield server
        assert server.stop() == 0, "".join(server.log)


@pytest.fixture
def server(shared_server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server, checked after each test: idle, no page held, accounts in balance."""
    yield shared_server
    info = shared_server.wait_idle()
    outcomes = dict(info["outcomes"])
    accepted, in_flight = outcomes.pop("accepted"), outcomes.pop("in_flight")
    assert in_flight == 0
    assert accepted == sum(outcomes.values())
    assert info["engine"]["pages_used"] == 0
    assert info["promised"] == {"sequences": 0, "prompt_tokens": 0, "pages": 0}
