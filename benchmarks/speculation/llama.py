"""llama.cpp's server with and without its own draft-model speculation."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.peers import places

PORT = 18753
START_S, ANSWER_S = 60.0, 120.0


@contextmanager
def server(model: Path, draft: Path | None, threads: int) -> Iterator[str]:
    """Run ``llama-server``; yields its address. The draft settings are its defaults."""
    command: list[str | Path] = [places.llama_tool("llama-server"), "-m", model]
    command += ["-t", str(threads), "-c", "1024", "-np", "1", "--port", str(PORT), "--no-webui"]
    if draft is not None:
        command += ["-md", draft, "-td", str(threads)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    address = f"http://127.0.0.1:{PORT}"
    try:
        _wait(address, process)
        yield address
    finally:
        process.terminate()
        process.wait()


def rate(address: str, prompts: Sequence[str], tokens: int, temperature: float) -> dict[str, Any]:
    """Decoded tokens per second over some prompts, and how its drafts fared."""
    seconds, made, drafted, accepted = 0.0, 0, 0, 0
    for i, prompt in enumerate(prompts):
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": temperature,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "seed": 5 + i,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = _post(f"{address}/completion", body)
        timings = answer["timings"]
        seconds += timings["predicted_ms"] / 1e3
        made += timings["predicted_n"]
        drafted += timings.get("draft_n", 0)
        accepted += timings.get("draft_n_accepted", 0)
    return {"tok_s": made / seconds, "drafted": drafted, "accepted": accepted}


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError("llama-server did not start")


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)
