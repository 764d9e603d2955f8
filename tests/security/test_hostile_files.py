"""Mutated model files are opened or refused; never a crash, never much memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SEED = int(os.environ.get("TEST_SEED", "1"))


@pytest.mark.parametrize(
    "kind", ["safetensors", "gguf", "tokenizer", "adapter", "adapter settings", "kv-segment"]
)
@pytest.mark.parametrize(
    "count",
    [400, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_mutated_files_are_opened_or_refused(kind: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kits.fuzz", kind, str(count), str(SEED)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
