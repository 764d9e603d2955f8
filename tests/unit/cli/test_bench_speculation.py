"""Advice on speculation: prompts read, ways compared, nothing switched on that does not pay."""

from __future__ import annotations

from pathlib import Path

import pytest

from coppice.cli.bench_speculation import advise, compare, read_prompts
from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError
from tests.kits.costs import rows_cost_nothing
from tests.kits.models import SMALL


def test_prompts_are_lines_or_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('plain\n\n{"prompt": "in json"}\n{not json\n')
    assert read_prompts(path) == ["plain", "in json", "{not json"]


@pytest.mark.parametrize("text", ["", "one\n", '{"text": "x"}\ntwo\n'])
def test_files_without_prompts_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "nothing")


def test_what_does_not_pay_is_left_off() -> None:
    assert advise({"off": 1.0, "suffix": 1.04, "auto": 0.9}) == "off"
    assert advise({"off": 1.0, "suffix": 2.0, "auto": 1.9}) == "suffix"


def test_all_ways_answer_alike_and_suffixes_take_fewer_steps_on_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows_cost_nothing(monkeypatch)
    config = EngineConfig(model=SMALL, kv_cache_mib=8)
    found = compare(config, ["the same words"] * 3, answer_tokens=24, temperature=0.0)
    assert set(found) == {"off", "lookup", "suffix", "auto"}
    assert len({tally.tokens for tally in found.values()}) == 1
    assert found["suffix"].steps < found["off"].steps
