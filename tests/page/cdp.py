"""Chromium over its own pipe (Chrome DevTools Protocol): no port, no driver, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage",
    "--no-proxy-server", "--no-pings", "--force-color-profile=srgb", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class PageError(AssertionError):
    """The page or the browser said something went wrong."""


class Browser:
    """One headless browser with one page; everything it says is kept in `events`."""

    def __init__(self, binary: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="coppice-chromium-")
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        command = [binary, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        # The protocol wants descriptors 3 and 4; a shell puts them there.
        script = f'exec 3<&{from_us} 4>&{to_us}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command],
            pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        self._numbers = itertools.count(1)
        self._replies: dict[int, queue.Queue[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        threading.Thread(target=self._listen, daemon=True).start()
        targets = self._wait_for_page()
        made = self.send("Target.attachToTarget", targetId=targets, flatten=True)
        self._session = made["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _wait_for_page(self) -> str:
        for _ in range(100):
            for target in self.send("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return str(target["targetId"])
            time.sleep(0.05)
        raise PageError("Chromium opened no page.")

    def _listen(self) -> None:
        rest = b""
        while chunk := os.read(self._from, 1 << 16):
            *frames, rest = (rest + chunk).split(b"\0")
            for frame in frames:
                message = json.loads(frame)
                waiting = self._replies.pop(message.get("id", 0), None)
                if waiting is not None:
                    waiting.put(message)
                elif "method" in message:
                    self.events.append(message)

    def send(self, method: str, timeout_s: float = 30.0, **params: Any) -> dict[str, Any]:
        """Call a protocol method and return its result."""
        number = next(self._numbers)
        reply: queue.Queue[dict[str, Any]] = queue.Queue()
        self._replies[number] = reply
        body: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            body["sessionId"] = self._session
        os.write(self._to, json.dumps(body).encode() + b"\0")
        try:
            message = reply.get(timeout=timeout_s)
        except queue.Empty:
            raise PageError(f"Chromium did not answer {method} in {timeout_s} s.") from None
        if "error" in message:
            raise PageError(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        reply = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in reply:
            raise PageError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait(self, what: str | Callable[[], Any], timeout_s: float = 20.0) -> None:
        """Wait until an expression (or a function) is truthy."""
        until = time.monotonic() + timeout_s
        while True:
            value = what() if callable(what) else self.evaluate(f"Boolean({what})")
            if value:
                return
            if time.monotonic() > until:
                shown = what if isinstance(what, str) else getattr(what, "__name__", "condition")
                raise PageError(f"Not within {timeout_s} s: {shown}")
            time.sleep(0.03)

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.leave()
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def leave(self) -> None:
        """Go to an empty page, so that nothing asks a server any more."""
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        """The text a person sees in an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.send("Input.insertText", text=text)

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press a key."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        common = {
            "key": name, "code": name, "windowsVirtualKeyCode": codes[name],
            "modifiers": 8 if shift else 0,
        }  # fmt: skip
        text = {"text": "\r"} if name == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Make the window this large, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=scale, mobile=width < 500,
        )  # fmt: skip

    def scheme(self, name: str) -> None:
        """What the system prefers: ``light`` or ``dark``."""
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": name}],
        )

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def requested(self) -> list[str]:
        """Every address the page asked for since `open`."""
        return [
            event["params"]["request"]["url"]
            for event in list(self.events)
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Console errors, exceptions and refused loads since `open`."""
        found = []
        for event in list(self.events):
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"])[:500])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] == "error":
                found.append(json.dumps(params["args"])[:500])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def close(self) -> None:
        """End the browser and forget its profile."""
        try:
            self._session = None
            self.send("Browser.close", timeout_s=5.0)
            self._process.wait(10)
        except (PageError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        shutil.rmtree(self._profile, ignore_errors=True)
