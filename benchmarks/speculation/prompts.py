"""Beginnings of prose and code that the bundled models were not trained on."""

from __future__ import annotations

from pathlib import Path

from coppice.models.tokenizer import Tokenizer
from recipes.bundled.corpus import DEFAULT_DATA, read_documents

KINDS = {"prose": "novels", "code": "python"}
LENGTH = 64


def held_out(tokenizer: Tokenizer, count: int, data: Path = DEFAULT_DATA) -> dict[str, list[str]]:
    """``count`` texts of about `LENGTH` tokens of each kind, from the middle of documents.

    Raises:
        FileNotFoundError: the public texts are not there.
    """
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for document in read_documents(data):
        for kind, source in KINDS.items():
            if document.source == source and document.held_out and len(found[kind]) < count:
                middle = document.text[len(document.text) // 2 :]
                start = middle.find("\n") + 1
                tokens = tokenizer.encode(middle[start : start + 8 * LENGTH])
                if len(tokens) >= LENGTH:
                    found[kind].append(tokenizer.decode(tokens[:LENGTH]))
    return found
