"""A server over the scripted engine for each file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kits.server import ServerProcess


@pytest.fixture(scope="module")
def server(fake_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess(fake_model, fake={"step_s": 0.002}) as made:
        yield made
