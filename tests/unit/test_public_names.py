"""The package's front door: quick, lazy, and complete."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import coppice


def test_import_is_quick_and_without_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import coppice; "
        "spent = time.perf_counter() - t; "
        "heavy = {'torch', 'numpy', 'fastapi', 'typer', 'pydantic'} & set(sys.modules); "
        "print(spent, sorted(heavy))"
    )
    times = []
    for _ in range(3):  # the best of three: the machine may be busy with other tests
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent, _, heavy = out.partition(" ")
        assert heavy.strip() == "[]", out
        times.append(float(spent))
    assert min(times) < 0.5


def test_front_door_names_need_no_torch_until_the_engine_is_asked_for() -> None:
    code = (
        "import sys; from coppice import SamplingParams, Request, RequestOutput, errors; "
        "assert SamplingParams(n=2).n == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = coppice.LMM


def test_dir_lists_the_public_names() -> None:
    assert {"LLM", "SamplingParams", "Request", "RequestOutput", "serve", "errors"} <= set(
        dir(coppice)
    )


def test_version_is_the_project_s(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert coppice.__version__ == project["version"]
