"""The documentation's examples run, and its commands and links exist.

A fenced block whose info string is ``sh run`` or ``python run`` is executed in an empty
folder; with ``run server`` a server of the bundled model stands at the address it names.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from coppice.cli.app import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ADDRESS = "127.0.0.1:8000"
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```", re.M | re.S)


class Example(NamedTuple):
    """One fenced block."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            language, marks = match[1], tuple(match[2].split())
            found.append(Example(page, line, language, marks, match[3]))
    return found


RUNNABLE = [example for example in examples() if "run" in example.marks]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``coppice`` and ``python`` as this interpreter runs them."""
    folder = tmp_path_factory.mktemp("bin")
    for name, arguments in (("coppice", "-m coppice "), ("python", "")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the bundled model, with a journal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "coppice", "serve", "--port", address.split(":")[1]]
    command += ["--journal", str(tmp_path_factory.mktemp("journal"))]
    process = subprocess.Popen([*command, "--drain-announce-s", "0"])
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://{address}/health/ready", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, "the server ended while starting"
                assert time.monotonic() < give_up, "the server was not ready within 60 s"
                time.sleep(0.1)
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("example", RUNNABLE, ids=lambda example: example.id)
def test_example_runs(
    example: Example, commands: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = example.text
    if "server" in example.marks:
        assert ADDRESS in text, "a block marked `server` names the server's address"
        text = text.replace(ADDRESS, request.getfixturevalue("server"))
    command = {
        "sh": ["sh", "-e", "-c", text],
        "python": [sys.executable, "-c", text],
    }[example.language]
    source = os.environ.get("PYTHONPATH", "")
    environ = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in source.split(os.pathsep) if p),
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), "an example shows something"
    assert '"error"' not in done.stdout, done.stdout


def test_there_are_examples_to_run() -> None:
    pages = {example.page.name for example in RUNNABLE}
    assert {"README.md", "first-answer.md", "structured-output.md", "streaming.md"} <= pages


def test_every_coppice_command_shown_has_only_flags_that_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = [
        (example.id, line)
        for example in examples()
        if example.language == "sh"
        for line in example.text.replace("\\\n", " ").splitlines()
        if re.match(r"(\w+=\S+ )*coppice\b|.*\| coppice\b", line)
    ]
    assert len(shown) > 10
    for where, line in shown:
        words = shlex.split(line[line.index("coppice") :], comments=True)
        verbs = [word for word in words[1:3] if word.isalpha()][: 2 if words[1] == "bench" else 1]
        capsys.readouterr()
        assert run([*verbs, "--help"]) == 0, f"{where}: {line}"
        known = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", known), f"{where}: {word} is unknown"


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_files_named_in_the_technique_table_exist() -> None:
    text = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    rooms = "scheduling|engine|cache|kernels|models|weights|server|cost"
    named = re.findall(rf"`((?:{rooms})/[\w/.]*)`", text)
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / "src" / "coppice" / name).exists()]
