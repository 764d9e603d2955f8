"""Token streams per source, and the windows that training draws from them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from recipes.bundled.chat import conversations, render, seed_conversations
from recipes.bundled.corpus import read_documents

Tokens = NDArray[np.uint16]
SOURCES = ("novels", "plays", "python", "chat", "seeds", "written")
MIXTURE = {"novels": 0.40, "plays": 0.06, "python": 0.26, "chat": 0.26, "seeds": 0.02}
"""Share of the windows drawn from each source."""
END_OF_TEXT_ID = 0


def build_streams(data: Path, work: Path) -> None:
    """Encode every source into ``work/<split>_<source>.npy`` (uint16 token ids).

    Each document is followed by ``<|endoftext|>``. ``<split>_<source>.bytes`` holds
    the UTF-8 size of the text without special tokens, for bits per byte.
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    texts: dict[tuple[str, str], list[str]] = {}
    for document in read_documents(data):
        split = "held" if document.held_out else "train"
        texts.setdefault((split, document.source), []).append(document.text)
        chats = texts.setdefault((split, "chat"), [])
        chats.extend(render(c) for c in conversations(document))
    texts["train", "seeds"] = [render(c) for c in seed_conversations()]
    for (split, source), parts in texts.items():
        order = np.random.default_rng(0).permutation(len(parts))
        encoded = tokenizer.encode_batch([parts[i] for i in order])
        ids = [np.append(np.array(e.ids, np.uint16), END_OF_TEXT_ID) for e in encoded]
        stream = np.concatenate(ids).astype(np.uint16)
        num_bytes = sum(len(tokenizer.decode(e.ids).encode()) for e in encoded)
        np.save(work / f"{split}_{source}.npy", stream)
        (work / f"{split}_{source}.bytes").write_text(f"{num_bytes}\n")
        print(
            f"{split:5} {source:7} {len(parts):6} documents {num_bytes:9} bytes "
            f"{len(stream):8} tokens"
        )


def load_stream(work: Path, split: str, source: str) -> tuple[Tokens, int]:
    """Return one stream and the bytes of text it stands for."""
    stream: Tokens = np.load(work / f"{split}_{source}.npy")
    return stream, int((work / f"{split}_{source}.bytes").read_text())


@dataclass
class WindowSampler:
    """Draw training windows without replacement, repeatably.

    The state is ``cursor`` alone: windows taken so far per ``source:length``.
    """

    streams: dict[str, Tokens]
    seed: int
    cursor: dict[str, int] = field(default_factory=dict)
    mixture: dict[str, float] = field(default_factory=lambda: MIXTURE)

    def batch(self, rows: int, length: int) -> NDArray[np.int64]:
        """Return ``[rows, length + 1]`` token ids; targets are inputs moved by one."""
        return np.stack([self._next(self._source(), length) for _ in range(rows)])

    def _source(self) -> str:
        """Name the source that lags most behind its share."""
        drawn = {s: sum(n for k, n in self.cursor.items() if k.startswith(s)) for s in self.mixture}
        total = sum(drawn.values()) + 1
        return max(self.mixture, key=lambda s: self.mixture[s] * total - drawn[s])

    def _next(self, source: str, length: int) -> NDArray[np.int64]:
        stream = self.streams[source]
        key = f"{source}:{length}"
        count = self.cursor.get(key, 0)
        self.cursor[key] = count + 1
        windows = max(1, (len(stream) - 1) // length)
        epoch, index = divmod(count, windows)
        rng = np.random.default_rng([self.seed, SOURCES.index(source), length, epoch])
        shift = int(rng.integers(length))
        start = (int(rng.permutation(windows)[index]) * length + shift) % len(stream)
        start = self._snap(stream, start, length)
        positions = np.arange(start, start + length + 1) % len(stream)
        return stream[positions].astype(np.int64)

    @staticmethod
    def _snap(stream: Tokens, start: int, length: int) -> int:
        """Move back to the nearest document start when it is less than half a window away."""
        before = stream[max(0, start - length // 2) : start]
        ends = np.flatnonzero(before == END_OF_TEXT_ID)
        return start if len(ends) == 0 else start - len(before) + int(ends[-1]) + 1
