"""The suffix index in Python: what native/suffix.cpp is compared with, and its stand-in.

The same levels, the same occurrences in the same order, the same sums: proposals are equal
to the last bit. Only collisions of the native hash table may hide an occurrence from it.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence

LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
BREAK = -1
LONGEST = 64
WALK = 32
OCCURRENCES = 24
LEAST = 0.01

Behind = list[tuple[list[int], int, int]]
"""Occurrences of a match: the text, the position after it, its length."""


class SuffixIndex:
    """A text and where its recent tokens were seen; see native/suffix.h.

    Args:
        most: tokens held at the same time.
        last: not used here: Python's numbers do not end.
    """

    def __init__(self, most: int, last: int = 0) -> None:
        self._most = most
        self._clear()

    def _clear(self) -> None:
        self._text: list[int] = []
        self._begin = 0
        self._run = 0
        self._ends: list[defaultdict[tuple[int, ...], list[int]]] = [
            defaultdict(list) for _ in LEVELS
        ]

    def __len__(self) -> int:
        return len(self._text) - self._begin

    @property
    def size_bytes(self) -> int:
        """About what a list of tokens and a place on every level take."""
        return len(self._text) * (8 + 160 * len(LEVELS))

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the current text."""
        for token in tokens:
            end = len(self._text)
            for n, ends in zip(LEVELS, self._ends, strict=True):
                if n <= self._run:
                    ends[tuple(self._text[end - n :])].append(end)
            self._text.append(token)
            self._run = 0 if token == BREAK else self._run + 1
            self._begin = max(self._begin, len(self._text) - self._most)
        if self._begin > 2 * self._most:
            kept = self.tokens()
            self._clear()
            self.extend(kept)

    def end_text(self) -> None:
        """What follows is another text; no match reaches over the border."""
        if self._run:
            self.extend([BREAK])

    def tokens(self) -> list[int]:
        """All tokens held, oldest first, texts parted by ``BREAK``."""
        return self._text[self._begin :]

    def propose(
        self, history: SuffixIndex | None, limit: int
    ) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and log path chances of the likeliest continuations, best first."""
        recent = self._text[max(self._begin, len(self._text) - LONGEST) :]
        found = self._find(recent)
        if history is not None:
            found += history._find(recent)
        heap: list[tuple[float, int, int, int, int, Behind]] = []
        tokens: list[int] = []
        parents: list[int] = []
        logf: list[float] = []
        serial = _push(heap, 0, found, depth=0, parent=-1, chance=1.0)
        while heap and len(tokens) < limit:
            chance, _, parent, token, depth, behind = heapq.heappop(heap)
            if -chance < LEAST:
                break
            tokens.append(token)
            parents.append(parent)
            logf.append(math.log(-chance))
            node = len(tokens) - 1
            serial = _push(heap, serial, behind, depth=depth, parent=node, chance=-chance)
        return tokens, parents, logf

    def _find(self, recent: list[int]) -> Behind:
        if BREAK in recent:
            recent = recent[len(recent) - recent[::-1].index(BREAK) :]
        found: Behind = []
        seen = LONGEST + 1
        for n, ends in reversed(list(zip(LEVELS, self._ends, strict=True))):
            if n > len(recent):
                continue
            if len(found) >= OCCURRENCES:
                break
            for position in reversed(ends.get(tuple(recent[-n:]), [])[-WALK:]):
                if position < self._begin or len(found) >= OCCURRENCES:
                    break
                length = self._match(recent, position)
                if n <= length < seen:
                    found.append((self._text, position, length))
            seen = n
        return found

    def _match(self, recent: list[int], before: int) -> int:
        limit = min(len(recent), before - self._begin)
        n = 0
        while n < limit and self._text[before - 1 - n] == recent[-1 - n]:
            n += 1
        return n


def _push(
    heap: list[tuple[float, int, int, int, int, Behind]],
    serial: int,
    here: Behind,
    *,
    depth: int,
    parent: int,
    chance: float,
) -> int:
    """Queue the tokens that follow a node, each with its share; the next serial number."""
    groups: dict[int, Behind] = {}
    masses: dict[int, float] = {}
    total, longest = 0.0, 0
    for each in here:
        text, position, length = each
        token = text[position + depth] if position + depth < len(text) else BREAK
        if token == BREAK:
            continue
        groups.setdefault(token, []).append(each)
        masses[token] = masses.get(token, 0.0) + _weight(length)
        total += _weight(length)
        longest = max(longest, length)
    trusted = _trust(longest + depth)
    for token, behind in groups.items():
        share = chance * (masses[token] / total) * trusted
        heapq.heappush(heap, (-share, serial, parent, token, depth + 1, behind))
        serial += 1
    return serial


def _weight(length: int) -> float:
    """How much one occurrence of a match counts."""
    return float(length) * float(length)


def _trust(length: int) -> float:
    """How far the longest match is to be trusted."""
    return 1.0 - 0.9 / (length + 0.5)
