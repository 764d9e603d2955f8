"""One browser for all page tests; a stand-in server for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.cdp import Browser, find_chromium
from tests.page.stand_in import StandIn


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    browser = Browser(binary)
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.size(1280, 820)
    chromium.scheme("light")
    yield chromium
    chromium.leave()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.close()
