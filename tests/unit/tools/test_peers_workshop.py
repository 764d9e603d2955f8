"""Building peers: steps run once, failures are told with the log, nothing half done stays."""

from __future__ import annotations

import sys
import tarfile

import pytest

from tools.peers import places, recipes
from tools.peers.recipes import Recipe
from tools.peers.workshop import StepError, Workshop

APPEND = [sys.executable, "-c", "open('out', 'a').write('x')"]


def test_a_step_runs_once_until_its_command_changes(tmp_path):
    shop = Workshop(tmp_path / "peer", "peer")
    for _ in range(2):
        shop.step("write", APPEND)
    assert (shop.folder / "out").read_text() == "x"
    shop.step("write", [*APPEND, "again"])
    assert (shop.folder / "out").read_text() == "xx"
    shop.step("write", [*APPEND, "again"], always=True)
    assert (shop.folder / "out").read_text() == "xxx"


def test_a_failure_shows_the_last_lines_and_is_tried_again(tmp_path):
    shop = Workshop(tmp_path / "peer", "peer")
    command = [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"]
    for _ in range(2):
        with pytest.raises(StepError, match=r"fail: exit code 3(.|\n)*what went wrong"):
            shop.step("fail", command)


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(StepError, match="no-such-compiler is needed and not installed"):
        Workshop(tmp_path, "peer").step("build", ["no-such-compiler"])


def test_a_recipe_is_complete_only_after_its_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROOT", tmp_path)
    calls = []

    def build(shop, torch):
        calls.append(torch)
        shop.step("fail" if len(calls) == 1 else "work", ["false" if len(calls) == 1 else "true"])

    recipe = Recipe("toy", "toy 1", build)
    assert "exit code 1" in recipe.install("torch==1")
    assert places.installed("toy") is None
    assert recipe.install("torch==1") is None
    assert places.installed("toy") == "toy 1"
    assert recipe.install("torch==1") is None
    assert calls == ["torch==1"] * 2  # the third time there was nothing to do


def test_only_the_wanted_part_of_a_source_distribution_is_unpacked(tmp_path):
    tree = tmp_path / "name-1.0"
    (tree / "vendor/llama.cpp/src").mkdir(parents=True)
    (tree / "vendor/llama.cpp/src/a.cpp").write_text("a")
    (tree / "setup.py").write_text("")
    archive = tmp_path / "name.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "name-1.0")
    recipes._unpack(archive, "vendor/llama.cpp/", tmp_path / "out")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*"))
    assert found == ["src", "src/a.cpp"]
