"""Held-out text to score, and training text to calibrate on."""

from __future__ import annotations

import gzip
from pathlib import Path

from recipes.bundled.corpus import read_documents

CALIBRATION_BYTES = 600_000


def held_out(data: Path) -> dict[str, list[str]]:
    """Documents no bundled model was trained on, by source."""
    found: dict[str, list[str]] = {}
    for document in read_documents(data):
        if document.held_out:
            found.setdefault(document.source, []).append(document.text)
    wiki = data / "wikitext2" / "valid.txt.gz"
    if wiki.is_file():
        found["wiki"] = [gzip.decompress(wiki.read_bytes()).decode("utf-8")]
    return found


def calibration(data: Path) -> str:
    """Training documents from all over the sources, never a held-out one."""
    texts = [document.text for document in read_documents(data) if not document.held_out]
    step = max(1, sum(map(len, texts)) // CALIBRATION_BYTES)
    return "\n\n".join(texts[step // 2 :: step])
