"""Mutated model files are loaded or refused; never a crash, never much memory."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from coppice.errors import CheckpointError, EngineError
from tests.kits import fuzz
from tests.kits.fuzz_bases import KINDS, Base

SEED = int(os.environ.get("TEST_SEED", "1"))
SIZE = 4 << 20
UNTOUCHED = 64 * SIZE
"""More than the C library ever takes from its heap: of what is free there nothing is asked for."""


@pytest.mark.parametrize("kind", KINDS)
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


def crash() -> None:
    faulthandler.disable()  # which would show it as this process' own
    ctypes.string_at(0)


def hidden() -> None:
    try:
        bytearray(1 << 40)
    except MemoryError:
        raise CheckpointError("The file is damaged.") from None


def ours() -> None:
    raise EngineError("A layer is odd.")


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "crash": (crash, "ended by SIGSEGV"),
    "another exception": (lambda: {}["x"], "KeyError"),
    "an error of ours": (ours, "no refusal of a file"),
    "bytes": (lambda: b"x" * (2 * SIZE + (2 << 20)), "took too much"),
    "untouched bytes": (lambda: bytearray(UNTOUCHED), "MemoryError"),
    "an untouched tensor": (lambda: torch.empty(UNTOUCHED, dtype=torch.uint8), "allocate memory"),
    "memory that runs out unsaid": (hidden, "asked for too much"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_loader_must_not_do_is_noticed(
    fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A loader that has a fault when the file is not what it was."""

    def bases(folder: Path, unpack: bool) -> Iterator[Base]:
        path = folder / "x"
        path.write_bytes(bytes(SIZE))

        def load() -> None:
            if any(path.read_bytes()[:2048]):
                FAULTS[fault][0]()

        yield Base(path=path, load=load, large=True)

    monkeypatch.setitem(fuzz.KINDS, "safetensors", bases)
    monkeypatch.setattr(sys, "argv", ["fuzz", "safetensors", "100", "1"])
    assert fuzz.main() not in (0, 2)
    said = capfd.readouterr()
    assert FAULTS[fault][1] in said.out + said.err
    assert "mutation" in said.out.splitlines()[-1]
