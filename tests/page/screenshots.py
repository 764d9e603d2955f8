"""Take the pictures of the page that the documentation shows.

    python -m tests.page.screenshots docs/assets

Serves the bundled model, asks it things beside a few other clients, and looks.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from tests.kits.server import ServerProcess
from tests.page.cdp import Browser, find_chromium
from tests.page.test_page_with_server import ENDLESS, ask

SETTINGS = {"temperature": 0.6, "maxTokens": 260, "seed": 4}
NEIGHBOURS = 9


def neighbours(server: ServerProcess) -> list[threading.Thread]:
    """Other clients, started one after the other."""
    client, model = server.client(), server.info()["model"]["name"]

    def run(number: int) -> None:
        text = f"{number}. To be, or not to be, that is the question. " * (1 + number)
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], seed=number,
            max_tokens=90 + 70 * number, temperature=0.8, extra_body={"ignore_eos": True},
        )  # fmt: skip

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NEIGHBOURS)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    return threads


def take(browser: Browser, server: ServerProcess, folder: Path) -> None:
    """All pictures."""
    ended = "document.querySelector('.answer:last-child:not(.busy)')"
    browser.size(1280, 820)
    browser.scheme("light")
    browser.open(f"{server.url}/")
    stored = json.dumps(json.dumps(SETTINGS))
    browser.evaluate(f"localStorage.setItem('coppice.settings', {stored})")
    browser.open(f"{server.url}/")
    time.sleep(2.2)  # until the stems have grown
    browser.screenshot(folder / "page-welcome.png")
    ask(browser, "Tell me a story about a tree that grows back.")
    browser.wait(ended, 60)
    others = neighbours(server)
    browser.evaluate(ENDLESS)
    ask(browser, "And what did the woodman say to it, when the spring came again?")
    time.sleep(2.2)
    browser.screenshot(folder / "page-light.png")
    browser.scheme("dark")
    time.sleep(0.8)  # until the colours have changed
    browser.screenshot(folder / "page-dark.png")
    browser.size(380, 760)
    time.sleep(0.4)
    browser.screenshot(folder / "page-narrow.png")
    browser.key("Escape")
    for thread in others:
        thread.join()


def main() -> None:
    """Take them into the folder named on the command line."""
    binary = find_chromium()
    if binary is None:
        raise SystemExit("There is no Chromium; on Debian: apt-get install chromium")
    browser = Browser(binary)
    try:
        with ServerProcess("bundled") as server:
            take(browser, server, Path(sys.argv[1]))
    finally:
        browser.close()


if __name__ == "__main__":
    main()
