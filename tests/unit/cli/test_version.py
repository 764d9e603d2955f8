"""``coppice --version`` needs no command."""

from __future__ import annotations

import pytest

from coppice import __version__
from coppice.cli.app import run


def test_version_is_printed_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"coppice {__version__}"
