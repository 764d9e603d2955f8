"""Settings: order of sources, origins, and refusals that name what to type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from coppice.engine.config import EngineConfig
from coppice.errors import ConfigError
from coppice.settings import RoomConfig, Sources, load_sources, resolve, setting, settings_of


@dataclass(frozen=True, kw_only=True)
class PondConfig(RoomConfig):
    """A room with one field of every supported kind."""

    ROOM: ClassVar[str] = "pond"

    name: str = setting("still", "Name of the pond.")
    mood: Literal["calm", "wild"] = setting("calm", "How it looks.")
    depth_m: float = setting(2.0, "Depth in metres.", minimum=0.0)
    num_fish: int | None = setting(None, "Fish; none means not counted.", minimum=0, maximum=9)
    frozen: bool = setting(False, "Whether one can skate.")
    ducks: tuple[str, ...] = setting((), "Names of the ducks.")
    key: str | None = setting(None, "Opens the gate.", secret=True)


ROOMS = (PondConfig, EngineConfig)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.yaml", "pond:\n  num_fish: 1\n  depth_m: 1\n  mood: wild\n  ducks: [a, b]\n"
    )
    environ = {"COPPICE_NUM_FISH": "2", "COPPICE_DEPTH_M": "3.5", "HOME": "x"}
    sources = load_sources(ROOMS, config=path, environ=environ)
    resolved = resolve(PondConfig, {"num_fish": "4", "name": None}, sources)
    assert resolved.config == PondConfig(num_fish=4, depth_m=3.5, mood="wild", ducks=("a", "b"))
    shown = {name: str(origin) for name, origin in resolved.origins.items()}
    assert shown["num_fish"] == "flag --num-fish"
    assert shown["depth_m"] == "variable COPPICE_DEPTH_M"
    assert shown["mood"] == f"file {path}"
    assert shown["name"] == "default"


def test_file_named_by_variable_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "pond: {frozen: true}\n")
    sources = load_sources(ROOMS, environ={"COPPICE_CONFIG": str(path)})
    assert resolve(PondConfig, sources=sources).config.frozen is True


def test_environment_is_read_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPPICE_FROZEN", "yes")
    assert resolve(PondConfig, sources=load_sources(ROOMS)).config.frozen is True


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_fish", "none", None),
        ("num_fish", " 7 ", 7),
        ("frozen", "OFF", False),
        ("frozen", "1", True),
        ("ducks", "a, b,,", ("a", "b")),
        ("ducks", "", ()),
        ("depth_m", "1e-3", 0.001),
        ("mood", "wild", "wild"),
    ],
)
def test_text_is_read_by_kind(name: str, text: str, value: object) -> None:
    sources = Sources({f"COPPICE_{name.upper()}": text})
    assert getattr(resolve(PondConfig, sources=sources).config, name) == value


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_fish": "many"}, "num_fish must be a whole number, got 'many' from --num-fish"),
        ({"num_fish": 10}, "num_fish must be at most 9, got 10"),
        ({"num_fish": True}, "num_fish must be int or none, got True"),
        ({"depth_m": "nan"}, "depth_m must be a finite number"),
        ({"depth_m": "-1"}, "depth_m must be at least 0"),
        (
            {"mood": "wlid"},
            "must be one of calm, wild, got 'wlid' from --mood; did you mean 'wild'?",
        ),
        ({"frozen": "maybe"}, "frozen must be true or false"),
        ({"ducks": [1]}, "ducks must be a list of text"),
        ({"num_fsh": 1}, "Unknown pond setting 'num_fsh'; did you mean 'num_fish'?"),
    ],
)
def test_wrong_values_say_what_is_allowed(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(PondConfig, flags)
    assert says in caught.value.message
    assert caught.value.param == next(iter(flags))


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="num_fish must be at least 0"):
        PondConfig(num_fish=-1)
    with pytest.raises(ConfigError, match="page_size must be a power of two"):
        EngineConfig(page_size=24)
    with pytest.raises(ConfigError, match="Unknown engine setting 'pagesize'; did you mean"):
        EngineConfig.from_values(pagesize=16)
    assert EngineConfig.from_values(page_size=16) == EngineConfig(page_size=16)


def test_unknown_variable_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'COPPICE_NUM_FISH'"):
        load_sources(ROOMS, environ={"COPPICE_NUM_FIHS": "1"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ponds: {}\n", "unknown section 'ponds'; did you mean 'pond'?"),
        ("pond: {nmae: x}\n", "unknown key 'pond.nmae'; did you mean 'name'?"),
        ("pond: {name: x, name: y}\n", "'name' is written twice"),
        ("pond: {name: 3}\n", "name must be text, got 3"),
        ("pond: [name]\n", "section 'pond' must hold"),
        ("[1, 2]\n", "must hold sections"),
        ("pond: {1: x}\n", "the key 1 is not text"),
        ("pond: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("pond: {\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        resolve(PondConfig, sources=load_sources(ROOMS, config=path, environ={}))
    assert says in caught.value.message


def test_missing_oversized_and_binary_files_are_refused(tmp_path: Path) -> None:
    for path in (
        tmp_path / "absent.yaml",
        write(tmp_path / "big.yaml", "#" * (2 << 20)),
        tmp_path,
    ):
        with pytest.raises(ConfigError, match=path.name):
            load_sources(ROOMS, config=path, environ={})


def test_empty_file_is_no_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "# nothing yet\n")
    assert resolve(PondConfig, sources=load_sources(ROOMS, config=path, environ={})) == resolve(
        PondConfig
    )


def test_secrets_are_never_printed() -> None:
    key = next(item for item in settings_of(PondConfig) if item.name == "key")
    assert key.show("s3cret") == "(set)"
    assert key.show(None) == "none"
    with pytest.raises(ConfigError) as caught:
        resolve(PondConfig, {"key": ["s3cret"]})
    assert "s3cret" not in caught.value.message


def test_names_of_every_form() -> None:
    item = next(item for item in settings_of(EngineConfig) if item.name == "kv_cache_mib")
    assert (item.flag, item.variable, item.key) == (
        "--kv-cache-mib",
        "COPPICE_KV_CACHE_MIB",
        "engine.kv_cache_mib",
    )
    assert item.type_name == "int"


def test_every_engine_setting_has_a_sentence_and_a_valid_default() -> None:
    for item in settings_of(EngineConfig):
        assert item.sentence.endswith("."), item.name
        item.check(item.default, "default")
