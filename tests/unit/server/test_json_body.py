"""Bounded JSON: what passes, what does not, and that it stays linear."""

from __future__ import annotations

import contextlib
import json
import re
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coppice.errors import RequestError
from coppice.server.json_body import (
    MAX_DEPTH,
    MAX_NAMES,
    MAX_NUMBER_CHARS,
    MAX_VALUES,
    _without_strings,
    parse_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(codec="utf-8")), inner, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_any_ordinary_document_means_what_json_says(value: Any, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        parse_json(body)
    except RequestError as error:
        assert error.code == "invalid_json"


def test_depth_is_exact() -> None:
    parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    parse_json(b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)
    parse_json(b'["' + b"[" * 1000 + b'"]')  # in a string they are text
    for deep in (
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'[{"a":' * 40 + b"1" + b"}]" * 40,
    ):
        with pytest.raises(RequestError, match="nested"):
            parse_json(deep)


def test_number_length_is_exact() -> None:
    assert parse_json(b"1" * MAX_NUMBER_CHARS) == int("1" * MAX_NUMBER_CHARS)
    with pytest.raises(RequestError, match="characters"):
        parse_json(b"1" * (MAX_NUMBER_CHARS + 1))


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": "' + b'\\"' * 4_000_000, b"[" * 8_000_000, b"[]" * 4_000_000,
        b"[" + b"[]," * 2_000_000 + b"[]]", b'["' + b"\\\\" * 4_000_000 + b'"]',
        b'"' * 8_000_000, b"{" * 4_000_000 + b"}" * 4_000_000, b"-" * 8_000_000,
        b"[" + b'"a",' * 1_900_000 + b'"a"]',
    ],
    ids=range(9),
)  # fmt: skip
def test_eight_megabytes_of_anything_take_linear_time(body: bytes) -> None:
    started = time.process_time()
    with contextlib.suppress(RequestError):
        parse_json(body)
    assert time.process_time() - started < 4  # half a second on a quiet machine


@pytest.mark.parametrize("body", [b'""' * (2 << 20), b'{"a":' * 400_000, b'"\\"",' * 800_000])
def test_many_small_strings_take_no_multiple_of_the_body(body: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(RequestError):
        parse_json(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"1," * MAX_VALUES + b"1]",
        json.dumps({str(i): 0 for i in range(MAX_NAMES + 1)}).encode(),
    ],
    ids=["values", "names"],
)
def test_too_many_values_or_names_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="holds more than"):
        parse_json(body)


@given(st.binary(max_size=60).map(lambda raw: bytes(b'"\\[]a,'[c % 6] for c in raw)))
def test_strings_are_found_like_by_a_regular_expression(body: bytes) -> None:
    pattern = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
    if re.search(rb"\\", pattern.sub(b"", body)) is None:  # outside a string it is no JSON
        assert _without_strings(body) == pattern.sub(b"", body)
