"""The servers under load, each with room for 64 answers at once."""

from __future__ import annotations

import sys

import httpx

from benchmarks.scorecard import subjects
from tools.peers import places

SLOTS, CONTEXT = 64, 2048


class Coppice(subjects.Coppice):
    """``coppice serve`` as it is, with KV pages enough for `SLOTS`."""

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `benchmarks.scorecard.subjects.Subject`."""
        return [sys.executable, "-m", "coppice", "serve", "bundled", "--port", str(port)]


class LlamaCpp(subjects.LlamaCpp):
    """``llama-server`` with two threads, as many slots, and half the context for each."""

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `benchmarks.scorecard.subjects.Subject`."""
        program, model = str(places.llama_tool("llama-server")), str(places.gguf("bundled", "bf16"))
        sizes = ["-c", str(SLOTS * CONTEXT), "-np", str(SLOTS), "-t", "2", "--no-webui", "-cb"]
        return [program, "-m", model, "--host", "127.0.0.1", "--port", str(port), *sizes]


def info(port: int) -> dict[str, object]:
    """Coppice's ``/v1/coppice/info``."""
    made: dict[str, object] = httpx.get(f"http://127.0.0.1:{port}/v1/coppice/info").json()
    return made
