"""The kernel tests once more, on a build that notices bad memory accesses and overflow."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_under_sanitizers():
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if importlib.util.find_spec("nanobind") is None:
        missing.append("nanobind")
    if missing:
        pytest.skip(f"a sanitizer build needs {', '.join(missing)}")
    script = ROOT / "tools" / "test_sanitized.sh"
    done = subprocess.run(
        ["sh", script, sys.executable], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
