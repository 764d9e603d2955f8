"""The page against a real server: types, streams, stops, and sees the figures move."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.kits.fake_model import write_fake_model
from tests.kits.server import ServerProcess
from tests.page.cdp import Browser

pytestmark = pytest.mark.chromium

SAID = ".answer:last-child .said"
BUNDLED = Path(__file__).parents[2] / "src/coppice/models/bundled/target/model.safetensors"
WATCH = """
window.seen = { rate: 0, pages: 0, running: 0, lengths: new Set() };
setInterval(() => {
  const number = (id) => Number(document.getElementById(id).textContent.replaceAll(",", ""));
  seen.rate = Math.max(seen.rate, number("rate"));
  seen.pages = Math.max(seen.pages, number("pages-used"));
  seen.running = Math.max(seen.running, number("running"));
  seen.lengths.add(document.querySelector(".busy .said")?.textContent.length ?? 0);
}, 10);
0
"""

# The model may end its answer before anybody could stop it; these answers go on.
ENDLESS = """
window.plainFetch = window.fetch;
window.fetch = (url, options = {}) => plainFetch(url, options.body
  ? { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) }
  : options);
0
"""


@pytest.fixture(scope="module", params=["scripted engine", "bundled model"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The real HTTP process; the engine is scripted (slow and endless) or the real one."""
    if request.param == "scripted engine":
        made = ServerProcess(
            write_fake_model(tmp_path_factory.mktemp("model")), fake={"step_s": 0.02}
        )
    elif importlib.util.find_spec("coppice.engine.process") and BUNDLED.is_file():
        made = ServerProcess("bundled", engine={"num_threads": 1})
    else:
        pytest.skip("the engine or the bundled model is not built yet")
    with made:
        yield made


def ask(browser: Browser, text: str) -> None:
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type(text)
    browser.key("Enter")


def test_a_person_types_watches_and_stops(browser: Browser, server: ServerProcess) -> None:
    before = server.wait_idle()["outcomes"]
    browser.open(f"{server.url}/")
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    model = server.info()["model"]
    assert browser.text("#model-name") == model["name"]
    assert model["kernels"].split(";")[0] in browser.text("#model-facts")
    browser.evaluate(WATCH)
    browser.evaluate(ENDLESS)

    ask(browser, "Once upon a time there was a tree, " * 12)
    browser.wait("seen.lengths.size > 5 && seen.rate > 0 && seen.pages > 0")
    assert browser.evaluate("seen.running") == 1
    assert browser.evaluate("document.querySelector('.answer.busy') !== null")
    record = server.info()["timeline"]["requests"][0]
    assert record["outcome"] is None and record["completion_tokens"] > 0
    if model["name"] == "bundled":  # the scripted engine tells its times at the end only
        assert record["queue_s"] is not None, "the phases of a running request are not known"
    browser.click("#stop")
    browser.wait("document.querySelector('.answer:last-child:not(.busy)')")
    assert "stopped" in browser.text(".answer .foot")
    assert browser.text(SAID)

    info = server.wait_idle()
    assert info["outcomes"]["cancelled"] == before["cancelled"] + 1
    assert info["timeline"]["requests"][0]["outcome"] == "cancelled"
    browser.wait("document.querySelector('#pages-used').textContent === '0'")
    browser.wait("document.querySelector('#rate').textContent === '0'")
    browser.wait("document.querySelector('#requests [data-outcome=bad]')")
    assert "cancelled" in browser.text("#requests [data-outcome=bad]")

    origin = urlsplit(server.url).netloc
    asked = browser.requested()
    assert len(asked) > 5
    assert {urlsplit(url).netloc for url in asked} == {origin}
    assert not browser.complaints()


def test_a_whole_answer_ends_with_its_figures(browser: Browser, server: ServerProcess) -> None:
    before = server.wait_idle()["outcomes"]
    browser.open(f"{server.url}/")
    browser.evaluate(
        "localStorage.setItem('coppice.settings', JSON.stringify({maxTokens: 24, seed: 5}))"
    )
    browser.open(f"{server.url}/")
    ask(browser, "It was a dark and stormy night")
    browser.wait("document.querySelector('.answer:last-child:not(.busy)')")
    browser.evaluate("localStorage.clear()")
    info = server.wait_idle()
    assert info["outcomes"]["finished"] == before["finished"] + 1
    tokens = info["timeline"]["requests"][0]["completion_tokens"]
    assert 0 < tokens <= 24
    assert f"{tokens} token" in browser.text(".answer .foot")
    assert not browser.complaints()


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Browser, server: ServerProcess
) -> None:
    browser.size(380, 720)
    browser.open(f"{server.url}/")

    def check(where: str) -> None:
        wide = browser.evaluate(
            "[...document.querySelectorAll("
            "'html, body, .bar, .strip, #scroller, #live, #settings')]"
            ".filter(n => n.checkVisibility() && n.scrollWidth > n.clientWidth + 1)"
            ".map(n => n.id || n.tagName)"
        )
        assert not wide, where
        assert browser.evaluate("document.documentElement.scrollWidth") <= 380, where

    check("welcome")
    browser.evaluate(ENDLESS)
    ask(browser, "x" * 300 + " and some more words")
    browser.wait(f"document.querySelector('{SAID}')?.innerText")
    check("answering")
    browser.key("Escape")
    browser.wait("document.querySelector('.answer:last-child:not(.busy)')")
    browser.click("#show-live")
    browser.wait("document.querySelector('#requests li')")
    check("figures")
    browser.click("#show-live")
    browser.click("#show-settings")
    check("settings")
    server.wait_idle()


def test_light_and_dark_are_both_drawn(
    browser: Browser, server: ServerProcess, tmp_path: Path
) -> None:
    browser.open(f"{server.url}/")
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    shots = {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.screenshot(tmp_path / f"{scheme}.png")
        shots[scheme] = (tmp_path / f"{scheme}.png").read_bytes()
    assert shots["light"][:4] == b"\x89PNG"
    assert shots["light"] != shots["dark"]
    assert min(map(len, shots.values())) > 10_000  # something is drawn on them
