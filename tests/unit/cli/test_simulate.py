"""`coppice simulate`: every kind of trace, the picture, and traces that are none."""

from __future__ import annotations

import gzip
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from coppice.cli.app import run
from coppice.errors import ConfigError
from coppice.scheduling.traces import as_sequences, read_trace
from tests.kits.models import SMALL

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
VTC = "req_id,adapter_dir,prompt_len,output_len,req_time\n0,one,13,19,0.0\n1,two,36,13,0.2\n"
SLO = "emission_time_ms,input_length,output_length,slo_ratio\n0.0,100,25,1.2\n10.0,80,5,-150.0\n"
MOONCAKE = '{"timestamp": 500, "input_length": 758, "output_length": 50, "hash_ids": [0, 1]}\n'


def arguments(path: Path, *more: str) -> list[str]:
    return ["simulate", str(path), "--model", SMALL, "--cache-dir", str(path.parent), *more]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", AZURE), ("v.csv", VTC), ("s.csv", SLO), ("m.jsonl", MOONCAKE), ("z.csv.gz", VTC)],
)
def test_every_kind_of_trace(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    picture = tmp_path / "out.svg"
    more = ["--json", "--svg", str(picture), "--policy", "fair", "--base-tpot-s", "0.05"]
    assert run(arguments(path, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] == found["requests"] == text.strip().count("\n") + ("jsonl" in name)
    assert 0 < found["ms"]["time to first token"]["p50"] <= found["ms"]["whole answer"]["p99"]
    if name == "v.csv":
        assert found["service"] == {"one": 13 + 2 * 19, "two": 36 + 2 * 13}
    if name == "s.csv":
        assert found["wishes met"] == 1.0
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_tables_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.csv"
    path.write_text(VTC)
    assert run(arguments(path)) == 0
    text = capsys.readouterr().out
    assert "time to first token" in text
    assert "two" in text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a,b\n1,2\n", "no trace known"),
        ("", "holds no request"),
        (AZURE.replace("374", "-1"), "request 1"),
        (AZURE.replace("44", "x"), "request 1"),
        (VTC.replace("36", "99999999999"), "out of range"),
    ],
)
def test_traces_that_are_none_are_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        read_trace(path)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_trace(tmp_path / "t.csv.gz")
    (tmp_path / "t.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match="not an object"):
        read_trace(tmp_path / "t.jsonl")


def test_equal_prefixes_are_found_and_lengths_divided(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(MOONCAKE * 2)
    whole = as_sequences(read_trace(path))
    assert [s.blocks for s in whole] == [(0, 1), (0, 1)]
    halves = as_sequences(read_trace(path), divide=2)
    assert (halves[0].num_prompt, halves[0].num_answer, halves[0].blocks) == (379, 25, ())
    assert as_sequences(read_trace(path), max_context=100) == []
