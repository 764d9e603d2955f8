"""Texts over which splitters have taken quadratic time, as long as they may be.

With the bundled model's own tokenizer. Each is split whole, in time, and meanwhile others are
answered; it is then served, or refused for its tokens.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from coppice.models.locate import BUNDLED, locate
from coppice.models.tokenizer import Tokenizer
from coppice.server.convert import CHARS_PER_CONTEXT_TOKEN
from tests.kits.server import ServerProcess

FOLDER = locate(BUNDLED)
TOKENIZER = Tokenizer.open(FOLDER)
CONTEXT: int = json.loads((FOLDER / "config.json").read_text())["max_position_embeddings"]
MOST = CHARS_PER_CONTEXT_TOKEN * CONTEXT
RUNS = {
    "one letter": "a",
    "spaces": " ",
    "digits": "7",
    "line ends": "\n",
    "marks": "\u0301",
    "emoji": "\N{GRINNING FACE}",
    "punctuation": "=",
    "apostrophes": "'s",
    "spaces and line ends": " \n",
    "spaces and tabs": " \t",
    "letters and marks": "a\u0301",
    "every kind": "a1 =\n\t's\u0301",
}
ENDINGS = {"": "", " before a word": "x", " before a line end": " \n"}
SPLIT_S, LIVE_S = 1.0, 0.25


class Pulse(threading.Thread):
    """Asks all the time whether the server lives, and how long the slowest answer took."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(daemon=True)
        self._server, self._done = server, threading.Event()
        self.longest_s, self.answered = 0.0, 0

    def run(self) -> None:
        with self._server.http() as http:
            while not self._done.is_set():
                began = time.monotonic()
                assert http.get("/health/live").status_code == 200
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.answered += 1

    def __enter__(self) -> Pulse:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    facts = {"context_length": CONTEXT, "vocab_size": TOKENIZER.vocab_size, "eos": 2}
    with ServerProcess("bundled", fake=facts) as made:
        yield made


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("unit", RUNS.values(), ids=RUNS)
def test_the_longest_text_of_a_kind_is_split_in_time(
    server: ServerProcess, unit: str, ending: str
) -> None:
    text = (unit * MOST)[: MOST - len(ending)] + ending
    assert len(text) == MOST
    with server.http() as http, Pulse(server) as pulse:
        began = time.monotonic()
        split = http.post("/tokenize", json={"prompt": text})
        took_s = time.monotonic() - began
        served = http.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    tokens = split.json()["tokens"]
    assert b"".join(map(TOKENIZER.token_bytes, tokens)) == text.encode(), "every letter of it"
    assert took_s < SPLIT_S
    assert pulse.answered > 1 and pulse.longest_s < LIVE_S
    if len(tokens) < CONTEXT:
        assert served.status_code == 200 and served.json()["usage"]["prompt_tokens"] == len(tokens)
    else:
        error = served.json()["error"]
        assert (served.status_code, error["code"]) == (400, "context_overflow")
        assert f"{len(tokens)} tokens" in error["message"] and f"{CONTEXT}" in error["message"]


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_no_other_thread_waits_for_a_long_text(what: str) -> None:
    """A library that kept the interpreter's lock would stop the event loop from its own thread."""
    text = "".join(RUNS.values()) * 20_000
    tokens = TOKENIZER.encode(text)
    gaps: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        began = last = time.monotonic()
        job: Future[object] = pool.submit(
            TOKENIZER.encode if what == "encode" else TOKENIZER.decode,
            text if what == "encode" else tokens,
        )
        while not job.done():
            time.sleep(0.001)
            gaps.append(time.monotonic() - last)
            last += gaps[-1]
    assert job.result() == (tokens if what == "encode" else text)
    assert max(gaps) < (last - began) / 2, "it was stopped for most of the time"


def test_a_letter_more_is_refused_unsplit(server: ServerProcess) -> None:
    with server.http() as http:
        for path in ("/tokenize", "/v1/completions"):
            error = http.post(path, json={"prompt": "a" * (MOST + 1)}).json()["error"]
            assert error["code"] == "context_overflow"
            assert f"{MOST + 1} characters" in error["message"] and f"{MOST}" in error["message"]
