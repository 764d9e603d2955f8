"""``make demo``: serve the bundled model on a free port, stream one answer, stop again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO

PROMPT = "Tell me a story about a storm at sea."
MAX_TOKENS = 120
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0

HOW_TO_GO_ON = """
That was a model of a few million parameters, trained to show the engine: expect rhythm, not sense.
How to go on:
  {bin}/coppice serve                      serve it yourself, with a chat page at http://127.0.0.1:8000
  {bin}/coppice serve path/to/model        a Hugging Face folder or a GGUF file
  {bin}/coppice chat                       talk in the terminal
  {bin}/coppice doctor                     what this machine offers
  docs/tutorial/first-answer.md            the first ten minutes
"""


def main() -> int:
    """Run the demonstration; returns the exit code."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        print(f"Starting the server on {url}", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "coppice", "serve", "--port", str(port)]
        command += ["--drain-announce-s", "0"]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("COPPICE_")}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
        try:
            if not wait_until_ready(server, url):
                return fail(log, "The server did not become ready")
            print(f"Ready after {time.monotonic() - begin:.1f} s. Asking: {PROMPT}\n", flush=True)
            stream_answer(url)
        except (OSError, ValueError) as error:
            return fail(log, f"The answer broke off: {error}")
        finally:
            code = stop(server)
        if code != 0:
            return fail(log, f"The server ended with exit code {code}")
    print("The server has stopped.", HOW_TO_GO_ON.format(bin=Path(sys.executable).parent), sep="\n")
    return 0


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    """Poll readiness until the model is loaded, the server ends or time is up."""
    give_up = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up and server.poll() is None:
        ready = f"{url}/health/ready"
        with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=5):
            return True
        time.sleep(0.1)
    return False


def stream_answer(url: str) -> None:
    """Print the answer as it comes, then how fast it came."""
    body = {
        "model": "bundled",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "min_tokens": MAX_TOKENS // 2,  # a small model may end after a word
        "temperature": 0.8,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    sent = time.monotonic()
    first = None
    num_tokens = 0
    with urllib.request.urlopen(request, timeout=120) as reply:
        for raw in reply:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                if text and first is None:
                    first = time.monotonic()
                print(text, end="", flush=True)
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    if first is None or not num_tokens:
        raise ValueError("no text came")
    spent = time.monotonic() - sent
    print(
        f"\n\n{num_tokens} tokens, the first after {first - sent:.2f} s, "
        f"{num_tokens / spent:.1f} tokens/s over HTTP"
    )


def stop(server: subprocess.Popen[bytes]) -> int:
    """Ask the server to drain and end; returns its exit code."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        return server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def fail(log: IO[str], sentence: str) -> int:
    """Say what went wrong, with the server's last lines."""
    log.seek(0)
    lines = log.read().splitlines()[-30:]
    print(f"\n{sentence}. The server's last lines:", *lines, sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
