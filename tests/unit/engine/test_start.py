"""What one start leaves for the next: read early when it is right, ignored when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.engine.config import EngineConfig
from coppice.engine.loading import load_engine_model
from coppice.engine.start import begin_reading
from coppice.models import load, packs
from tests.kits.models import SMALL


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(load, "PACKED_FROM", 0)  # the little test model is worth keeping here
    return EngineConfig(model=str(SMALL), quantization="int8", cache_dir=str(tmp_path))


def test_the_first_start_has_nothing_to_read(config: EngineConfig) -> None:
    assert begin_reading(config) is None


def test_a_second_start_reads_its_pack_once_and_early(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_engine_model(config)
    early = begin_reading(config)
    assert early is not None
    early.result()

    def again(path: Path, key: str) -> None:
        raise AssertionError(f"{path} is read twice")

    monkeypatch.setattr(packs, "load_pack", again)
    assert load_engine_model(config, early).facts == first.facts


def test_a_guess_that_is_wrong_is_not_used(config: EngineConfig, tmp_path: Path) -> None:
    load_engine_model(config)
    other = EngineConfig(model=str(SMALL), quantization="int4", cache_dir=str(tmp_path))
    early = begin_reading(config)
    assert load_engine_model(other, early).facts.weight_format.startswith("int4")


def test_damage_found_early_is_repaired(
    config: EngineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_engine_model(config).facts
    [path] = (tmp_path / "packs").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert load_engine_model(config, begin_reading(config)).facts == expected
    assert "made anew" in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pack": 3, "key": 1}', '{"pack": "x"', "null"])
def test_a_damaged_note_is_no_note(config: EngineConfig, tmp_path: Path, text: str) -> None:
    load_engine_model(config)
    [note] = (tmp_path / "starts").iterdir()
    note.write_text(text)
    early = begin_reading(config)
    assert load_engine_model(config, early).facts.weight_format == "int8"
    assert '"key"' in note.read_text()  # and it is written anew
