"""llama.cpp's server: a slot's KV saved to a file, then restored, when a client asks for it."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.peers import places

PORT = 18761
START_S, ANSWER_S, REPEATS = 120.0, 300.0, 3


@dataclass
class SlotTimes:
    """Seconds to the first token cold, and to restore the slot and get the first token."""

    cold: float
    restored: float
    file_bytes: int


def slot_times(model: str, prompt: list[int], folder: Path, threads: int) -> SlotTimes | None:
    """Measure one prompt; None where the server is not built.

    The file stays in the system's cache here: the server has just written it.
    """
    tool, file = places.llama_tool("llama-server"), places.gguf(model, "q8_0")
    if not tool.exists() or not file.exists():
        return None
    command: list[str | Path] = [tool, "-m", file, "-t", str(threads), "-c", str(len(prompt) + 64)]
    command += ["-np", "1", "--port", str(PORT), "--no-webui", "--slot-save-path", folder]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait(process)
        cold = _first_token(prompt)
        _post("/slots/0?action=save", {"filename": "slot.bin"})
        times = []
        for _ in range(REPEATS):
            _post("/slots/0?action=erase", {})
            began = time.perf_counter()
            _post("/slots/0?action=restore", {"filename": "slot.bin"})
            _first_token(prompt)
            times.append(time.perf_counter() - began)
        return SlotTimes(cold, statistics.median(times), (folder / "slot.bin").stat().st_size)
    finally:
        process.terminate()
        process.wait()


def _first_token(prompt: list[int]) -> float:
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "id_slot": 0}
    began = time.perf_counter()
    _post("/completion", body | {"cache_prompt": True})
    return time.perf_counter() - began


def _wait(process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError("llama-server did not start")


def _post(path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)
