"""The suffix index: native against Python, and Python against looking everywhere."""

from __future__ import annotations

import random

import pytest

from coppice.kernels import native_available
from coppice.kernels.suffix import BYTES_PER_TOKEN, SuffixIndex, make_index
from coppice.kernels.suffix_reference import LEVELS, LONGEST, OCCURRENCES

native = pytest.mark.skipif(not native_available(), reason="the native kernels are not built")


def occurrences(text: list[int], recent: list[int]) -> list[tuple[int, int]]:
    """Where the last tokens stood before, ``(length, position)``: longest levels, then newest."""
    found = []
    for at in range(1, len(text)):
        length = 0
        while (
            length < min(at, len(recent), LONGEST)
            and text[at - 1 - length] == recent[-1 - length] != -1
        ):
            length += 1
        if length:
            level = max(n for n in LEVELS if n <= length)
            found.append((-level, -at, length))
    return [(length, -at) for _, at, length in sorted(found)[:OCCURRENCES]]


def test_the_first_guess_is_the_vote_of_all_occurrences() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randint(2, 60))]
        index = make_index(1 << 10, backend="reference")
        index.extend(text)
        tokens, parents, logf = index.propose(None, 64)
        votes: dict[int, int] = {}
        for length, at in occurrences(text, text):
            votes[text[at]] = votes.get(text[at], 0) + length**2
        firsts = [t for t, p in zip(tokens, parents, strict=True) if p == -1]
        assert firsts[:1] == sorted(votes, key=lambda t: -votes[t])[:1] or (
            votes[firsts[0]] == max(votes.values())
        )
        assert logf == sorted(logf, reverse=True)
        for node, parent in enumerate(parents):
            assert parent < node
            assert parent == -1 or logf[node] < logf[parent]


def pair(most: int, last: int = 1 << 20) -> tuple[SuffixIndex, SuffixIndex]:
    return make_index(most, backend="native", last=last), make_index(most, backend="reference")


@native
@pytest.mark.parametrize("last", [1 << 20, 700])
def test_native_equals_python_while_texts_come_and_go(last: int) -> None:
    rng = random.Random(2)
    for _ in range(40):
        history, own = pair(256, last), pair(64, last)
        for _ in range(60):
            tokens = [rng.randrange(6) for _ in range(rng.randint(0, 12))]
            which = rng.random()
            for side in (0, 1):
                (history if which < 0.5 else own)[side].extend(tokens)
                if which < 0.2:
                    history[side].end_text()
            limit = rng.randint(0, 20)
            given = None if rng.random() < 0.3 else history
            found = [
                own[side].propose(None if given is None else given[side], limit) for side in (0, 1)
            ]
            assert found[0] == found[1]
            assert history[0].tokens() == history[1].tokens()
            assert len(own[0]) == len(own[1]) == len(own[0].tokens()) <= 64


@native
def test_a_full_index_forgets_its_oldest_and_grows_no_more() -> None:
    index = make_index(1 << 12)
    sizes = []
    for start in range(0, 1 << 14, 1 << 10):
        index.extend(list(range(start, start + (1 << 10))))
        sizes.append(index.size_bytes)
    assert sizes[3:] == [sizes[3]] * (len(sizes) - 3)
    assert sizes[-1] <= (1 << 12) * BYTES_PER_TOKEN + 4096
    assert index.tokens() == list(range((1 << 14) - (1 << 12), 1 << 14))
    index.extend([5, 6])  # long forgotten: 7 must not come back
    assert index.propose(None, 8) == ([], [], [])
    index.extend([16000, 16001])
    assert index.propose(None, 4)[0] == [16002, 16003, 16004, 16005]


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_no_match_reaches_over_a_border(backend: str) -> None:
    history = make_index(1 << 10, backend=backend)  # type: ignore[arg-type]
    history.extend([1, 2])
    history.end_text()
    history.end_text()  # twice is once
    history.extend([3, 4])
    own = make_index(1 << 10, backend=backend)  # type: ignore[arg-type]
    own.extend([1, 2])
    assert own.propose(history, 8) == ([], [], [])
    assert history.tokens() == [1, 2, -1, 3, 4]
