"""The unit and the image say what the program does: names exist, times fit, nobody is root."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from coppice.cli.app import app
from coppice.cli.rooms import ROOMS
from coppice.errors import ConfigError
from coppice.server.config import ServerConfig
from coppice.server.guard import POLICIES, Policy
from coppice.server.lifecycle import CLOSE_GRACE_S
from coppice.settings import settings_of
from tests.kits.server import ServerProcess

ROOT = Path(__file__).parents[2]
UNIT, IMAGE = ROOT / "deploy" / "coppice.service", ROOT / "deploy" / "Containerfile"
HOWTO = ROOT / "docs" / "howto" / "deploy.md"
OUTSIDE = {"PATH", "PYTHONDONTWRITEBYTECODE", "XDG_CACHE_HOME", "HF_HOME"}
DRAIN_S = ServerConfig().drain_announce_s + ServerConfig().drain_s + CLOSE_GRACE_S


def unit() -> dict[str, list[str]]:
    """The settings of the unit's service section, each with all its values."""
    made: dict[str, list[str]] = {}
    section = UNIT.read_text().partition("[Service]")[2].partition("[Install]")[0]
    for line in section.splitlines():
        name, is_one, value = line.partition("=")
        if is_one and not line.startswith("#"):
            made.setdefault(name, []).append(value)
    return made


def image() -> list[tuple[str, str]]:
    """The instructions of the container file, continued lines joined."""
    text = re.sub(r"\\\n", " ", IMAGE.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def last(name: str) -> str:
    return [rest for word, rest in image() if word == name][-1]


def require_command(words: list[str]) -> None:
    """A command of ours, with flags that it has."""
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "300"}).output
    for flag in (word for word in words if word.startswith("--")):
        assert flag in shown, flag


def require_variables(text: str) -> None:
    known = {item.variable for room in ROOMS for item in settings_of(room)} | {"COPPICE_CONFIG"}
    for name in re.findall(r"COPPICE_[A-Z_]+", text):
        assert name in known, name


def test_the_unit_starts_a_command_that_exists_as_nobody_in_particular() -> None:
    fields = unit()
    (start,) = fields["ExecStart"]
    program, *words = shlex.split(start)
    assert Path(program).name == "coppice"
    require_command(words)
    require_variables(UNIT.read_text())
    assert fields["DynamicUser"] == ["yes"] and "User" not in fields
    assert fields["NoNewPrivileges"] == ["yes"] and fields["CapabilityBoundingSet"] == [""]
    for path in re.findall(r"/run/\S+", start):
        assert path.startswith(f"/run/{fields['RuntimeDirectory'][0]}/")
    for path in re.findall(r"/var/lib/\S+", start):
        assert path.startswith(f"/var/lib/{fields['StateDirectory'][0]}/")
    assert fields["RuntimeDirectoryMode"] == fields["StateDirectoryMode"] == ["0700"]
    assert fields["RestartPreventExitStatus"] == [str(ConfigError.exit_code)]
    assert int(fields["LimitNOFILE"][0]) > 2 * ServerConfig().max_connections


def test_the_unit_waits_for_the_whole_drain_and_sends_its_signal_once() -> None:
    fields = unit()
    assert DRAIN_S < float(fields["TimeoutStopSec"][0]) <= DRAIN_S + 30
    assert fields["KillSignal"] == ["SIGTERM"] and fields["KillMode"] == ["mixed"]
    assert fields["OOMPolicy"] == ["continue"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_itself_accepts_the_unit(tmp_path: Path) -> None:
    made = tmp_path / UNIT.name
    made.write_text(UNIT.read_text().replace("/opt/coppice/bin/coppice", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(made)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(made)]
    scored = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"exposure level for \S+: ([\d.]+)", scored)
    assert found and float(found[1]) <= 2.0, scored


def test_the_image_runs_a_command_that_exists_as_a_user_without_rights() -> None:
    assert last("USER").isdecimal() and int(last("USER")) > 0
    words = yaml.safe_load(last("ENTRYPOINT")) + yaml.safe_load(last("CMD"))
    assert words[0] == "coppice"
    require_command(words[1:])
    require_variables(IMAGE.read_text())
    assert last("STOPSIGNAL") == "SIGTERM"
    assert words[words.index("--port") + 1] == last("EXPOSE")
    assert len([rest for word, rest in image() if word == "FROM"]) == 2
    names = set(re.findall(r"([A-Z_]+)=", last("ENV")))
    assert {name for name in names if not name.startswith("COPPICE_")} <= OUTSIDE


def test_the_image_is_asked_whether_it_lives_not_whether_it_is_busy() -> None:
    check = last("HEALTHCHECK")
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", check)
    assert found and found[1] == last("EXPOSE")
    assert POLICIES[found[2]] is Policy.PUBLIC
    code = yaml.safe_load(check.partition("CMD ")[2])[2]
    compile(code, "healthcheck", "exec")


def test_the_images_health_check_tells_life_from_death(fake_model: Path) -> None:
    code = yaml.safe_load(last("HEALTHCHECK").partition("CMD ")[2])[2]
    with ServerProcess(fake_model, fake={}) as server:
        here = code.replace(f":{last('EXPOSE')}", f":{server.port}")
        assert subprocess.run([sys.executable, "-c", here], check=False).returncode == 0
    dead = subprocess.run([sys.executable, "-c", here], check=False, capture_output=True)
    assert dead.returncode != 0


def test_the_howto_names_what_exists_and_waits_long_enough() -> None:
    text = HOWTO.read_text()
    require_variables(text)
    for route in re.findall(r"path: (/[\w/]+)", text):
        assert route in POLICIES
    periods = [
        float(n) for n in re.findall(r"(?:GracePeriodSeconds: |--stop-timeout[= ])(\d+)", text)
    ]
    assert len(periods) == 2 and all(DRAIN_S < period <= DRAIN_S + 30 for period in periods)
    for words in re.findall(r"^coppice (.+)$", text, re.MULTILINE):
        require_command(shlex.split(words))


def test_systemd_hears_of_readiness_life_and_the_end(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, interval_s = tmp_path / "notify", 1.5
    said: list[str] = []
    beats_s: list[float] = []

    def listen(heard: socket.socket) -> None:
        while (text := heard.recv(4096).decode()) != "over":
            said.append(text)
            if text == "WATCHDOG=1":
                beats_s.append(time.monotonic())

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", f"{interval_s * 1e6:.0f}")
        listening = threading.Thread(target=listen, args=(heard,))
        listening.start()
        try:
            with ServerProcess(fake_model, fake={"load_s": 0.5}):
                deadline = time.monotonic() + 20
                while len(beats_s) < 5 and time.monotonic() < deadline:
                    time.sleep(0.1)
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
                wire.sendto(b"over", str(path))
            listening.join(10)
    assert len(beats_s) >= 5
    assert max(later - earlier for earlier, later in pairwise(beats_s)) < interval_s
    assert said[0] == "WATCHDOG=1"  # before there is a model: loading is no standstill
    assert sum(text.startswith("READY=1\n") for text in said) == 1
    stops = [text for text in said if text.startswith("STOPPING=1\n")]
    assert len(stops) == 1 and "EXTEND_TIMEOUT_USEC=" in stops[0]
