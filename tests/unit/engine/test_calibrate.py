"""Calibration: a real model is timed, and engines find the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coppice.cache.pool import KVPool
from coppice.cli.app import run
from coppice.cost import read_curve
from coppice.engine.calibrate import ROWS, calibrate, curve_path
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.models.kv import KVLayout
from tests.kits.models import SMALL


def test_a_timed_model_gives_a_rising_curve() -> None:
    model = load_engine_model(EngineConfig(model=SMALL))
    seen: list[tuple[int, int]] = []
    curve = calibrate(model, seconds=0.3, progress=lambda n, of: seen.append((n, of)))
    assert curve.rows == ROWS
    assert 0 < curve.time(1) <= curve.time(256)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == 2 * len(ROWS)


def test_doctor_keeps_a_curve_where_engines_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no-probe", "--json", "--calibrate", "--model", SMALL, "--cache-dir", str(tmp_path)]
    assert run(["doctor", *flags]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    config = EngineConfig(model=SMALL, cache_dir=str(tmp_path))
    model = load_engine_model(config)
    path = curve_path(config.cache_folder, model.facts)
    assert steps["kept in"] == str(path)
    curve = read_curve(path)
    assert curve is not None
    engine = Engine(model, config)
    assert engine.cost.time(64) == curve.time(64)
    within_s = curve.time(64) * 1.0001
    assert engine.cost.rows_within(within_s, 500) == curve.rows_within(within_s, 500) >= 64


def test_a_curve_is_of_the_pages_it_was_timed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 pages are read at another cost, so their curve is another file and another timing."""
    configs = [EngineConfig(model=SMALL, kv_cache_dtype=kind) for kind in ("auto", "int8")]
    models = [load_engine_model(config) for config in configs]
    paths = {
        curve_path(config.cache_folder, m.facts) for config, m in zip(configs, models, strict=True)
    }
    assert len(paths) == 2
    kinds = []

    def pool(layout: KVLayout, num_pages: int) -> KVPool:
        kinds.append(layout.dtype)
        return KVPool(layout, num_pages)

    monkeypatch.setattr("coppice.engine.calibrate.KVPool", pool)
    calibrate(models[1], kv="int8", seconds=0.01)
    assert kinds == [torch.int8]
