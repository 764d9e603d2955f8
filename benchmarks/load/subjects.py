"""The servers under load, each with room for 64 answers at once."""

from __future__ import annotations

import sys

from benchmarks.scorecard import subjects
from tools.peers import places

SLOTS, CONTEXT = 64, 2048


class Coppice(subjects.Coppice):
    """``coppice serve`` as it is, with KV pages enough for `SLOTS`.

    Args:
        options: more of the command line.
    """

    def __init__(self, *options: str) -> None:
        self._options = options

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `benchmarks.scorecard.subjects.Subject`."""
        return [sys.executable, "-m", "coppice", "serve", "bundled", "--port", str(port),
                *self._options]  # fmt: skip


class LlamaCpp(subjects.LlamaCpp):
    """``llama-server`` with two threads, as many slots, and half the context for each."""

    def command(self, port: int, *, key: str | None) -> list[str]:
        """See `benchmarks.scorecard.subjects.Subject`."""
        program, model = str(places.llama_tool("llama-server")), str(places.gguf("bundled", "bf16"))
        sizes = ["-c", str(SLOTS * CONTEXT), "-np", str(SLOTS), "-t", "2", "--no-webui", "-cb"]
        return [program, "-m", model, "--host", "127.0.0.1", "--port", str(port), *sizes]
