"""Read the plain sources, cut them into documents and split them.

A document belongs to the training or to the held-out part for good: whatever is
derived from it later (chat turns, windows) stays on the same side.
"""

import gzip
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_DATA = REPOSITORY.parent / "shared" / "data"
CHUNK_CHARS = 16_000
HELD_OUT_EVERY = 50
SKIPPED_STDLIB = ("test", "tests", "idlelib", "site-packages", "encodings", "__phello__")


@dataclass(frozen=True)
class Document:
    """One contiguous piece of a source.

    Attributes:
        source: ``novels``, ``plays`` or ``python``.
        name: file stem or module path, for error messages and hashing.
        text: the text itself.
        held_out: true when the document only measures, never trains.
    """

    source: str
    name: str
    text: str
    held_out: bool


def read_documents(data: Path) -> list[Document]:
    """Return every document of every source, in a fixed order.

    Args:
        data: folder with ``gutenberg/`` and ``tinyshakespeare/``.

    Raises:
        FileNotFoundError: a source folder is missing or empty.
    """
    novels = sorted((data / "gutenberg").glob("*.txt.gz"))
    plays = sorted((data / "tinyshakespeare").glob("*.txt.gz"))
    if not novels or not plays:
        raise FileNotFoundError(f"no gutenberg/ or tinyshakespeare/ text under {data}")
    documents = [d for path in novels for d in _chunks("novels", path, reflow=True)]
    documents += [d for path in plays for d in _chunks("plays", path, reflow=False)]
    return documents + list(_python_files())


def _chunks(source: str, path: Path, *, reflow: bool) -> Iterator[Document]:
    """Cut one book at paragraph ends into chunks of about ``CHUNK_CHARS``."""
    name = path.name.removesuffix(".txt.gz")
    text = gzip.decompress(path.read_bytes()).decode("utf-8").replace("\r\n", "\n")
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    if reflow:
        paragraphs = [_reflow(p) for p in paragraphs]
    size, start, number = 0, 0, 0
    limit = CHUNK_CHARS if reflow else CHUNK_CHARS // 2
    for end, paragraph in enumerate(paragraphs, 1):
        size += len(paragraph)
        if size < limit and end < len(paragraphs):
            continue
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
        yield Document(source, f"{name}:{number}", "\n\n".join(paragraphs[start:end]), held_out)
        size, start, number = 0, end, number + 1


def _reflow(paragraph: str) -> str:
    """Join hard-wrapped prose into one line; leave verse and tables alone."""
    lines = paragraph.strip("\n").split("\n")
    if any(line.startswith((" ", "\t")) for line in lines):
        return "\n".join(line.rstrip() for line in lines)
    return " ".join(line.strip() for line in lines)


def _python_files() -> Iterator[Document]:
    """Yield the standard library of the running interpreter, one file a document."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(p in SKIPPED_STDLIB or p.startswith("config-") for p in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        name = "/".join(parts)
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        if text.strip():
            yield Document("python", name, text, digest % HELD_OUT_EVERY == 0)
