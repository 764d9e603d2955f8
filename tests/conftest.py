"""Shared by all tests: a clean environment and the shared data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A developer's own settings must not decide what a test sees, here or in child processes.
for _name in [name for name in os.environ if name.startswith("COPPICE_")]:
    del os.environ[_name]
# Nothing a test keeps reaches the user's cache folder, and nothing in it reaches a test.
_cache = tempfile.TemporaryDirectory(prefix="coppice-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data beside the repository; tests that need it skip where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the shared data is not at {path}")
    return path


@pytest.fixture(scope="session")
def fake_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a model to the front end: a tokenizer and a chat template."""
    from tests.kits.fake_model import write_fake_model

    return write_fake_model(tmp_path_factory.mktemp("model"))
