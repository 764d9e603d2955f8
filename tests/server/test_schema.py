"""The OpenAPI document against the server: valid, invalid and linked data (schemathesis)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kits.server import ServerProcess

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def fuzz(server: ServerProcess, folder: Path, examples: int) -> None:
    """Run schemathesis with valid and invalid data, coverage and stateful phases on."""
    seed = os.environ.get("TEST_SEED", "7")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--phases", "examples,coverage,fuzzing,stateful", "--mode", "all",
        "--checks", ",".join(CHECKS), "--max-examples", str(examples),
        "--request-timeout", "10", "--seed", seed, "--generation-deterministic",
        "--no-color", "--warnings", "off",
    ]  # fmt: skip
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert made.returncode == 0, f"TEST_SEED={seed}\n" + made.stdout[-8000:] + made.stderr[-2000:]
    assert "Stateful" in made.stdout
    print(made.stdout[-1000:])


@pytest.mark.timeout(240)
def test_no_data_makes_a_5xx_or_breaks_the_document(fake_model: Path, tmp_path: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.0}) as server:
        fuzz(server, tmp_path, 25)
        info = server.wait_idle()
        assert info["engine"]["pages_used"] == 0 and info["state"] == "ok"
        assert info["outcomes"]["finished"] > 0 and info["outcomes"]["failed"] == 0


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_no_data_makes_a_5xx_long(fake_model: Path, tmp_path: Path) -> None:
    with ServerProcess(fake_model, fake={"step_s": 0.0}) as server:
        fuzz(server, tmp_path, 2000)
        info = server.wait_idle()
        assert info["engine"]["pages_used"] == 0 and info["state"] == "ok"
        assert info["outcomes"]["finished"] > 0 and info["outcomes"]["failed"] == 0
