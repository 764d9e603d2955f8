"""The suffix proposer and its history: what is found, whose it is, how much is kept."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from coppice.kernels.suffix import BYTES_PER_TOKEN
from coppice.speculation import History, Learner, SuffixProposer
from coppice.speculation.history import MOST_SCOPES
from tests.unit.speculation.test_tree_and_lookup import View

MIB = 1 << 20
ANSWER = list(range(100, 140))


def taught(history: History, scope: str = "a") -> SuffixProposer:
    proposer = SuffixProposer(history)
    proposer.learn(View([1, 2, 3, *ANSWER], scope=scope), 3)
    return proposer


def chain(proposer: SuffixProposer, view: View, limit: int = 5) -> list[int]:
    [tree] = proposer.propose([view], [limit])
    assert tree is None or (tree.is_sound(1000) and len(tree) <= limit)
    return [] if tree is None else tree.tokens


def test_it_continues_the_request_itself() -> None:
    proposer, view = SuffixProposer(), View([7, 8, 9, 10, 7])
    assert chain(proposer, view) == [8, 9, 10, 7]
    view.tokens += [8, 9]
    assert chain(proposer, view)[0] == 10
    proposer.forget(view.arrival)
    view.tokens = [3, 3]  # shorter than what was read, were it not forgotten
    assert chain(proposer, view, 2)[0] == 3


def test_it_continues_earlier_answers_from_the_end_of_the_prompt_on() -> None:
    proposer = taught(History(MIB))
    assert chain(proposer, View([9, 2, 3], scope="a")) == ANSWER[:5]
    assert chain(proposer, View([9, 110, 111], arrival=2, scope="a")) == ANSWER[12:17]


def test_tenants_do_not_see_each_other() -> None:
    proposer = taught(History(MIB), scope="a")
    assert chain(proposer, View([2, 3], scope="b")) == []
    assert chain(proposer, View([2, 3], arrival=2, scope="a")) == ANSWER[:5]


def test_an_empty_answer_and_no_history_teach_nothing() -> None:
    history = History(MIB)
    SuffixProposer(history).learn(View([1, 2, 3]), 3)
    assert history.num_tokens == 0
    alone = SuffixProposer()
    alone.learn(View([1, 2, 3]), 1)
    alone.close()
    assert isinstance(alone, Learner)


def test_memory_stays_within_its_bound() -> None:
    history = History(MIB)
    for number in range(60):
        history.add(f"tenant {number % 7}", [number * 5000 + i for i in range(5000)])
        # An index that grows is beside the bound for as long as it takes to drop another.
        assert history.size_bytes <= MIB
    assert history.evicted > 0
    alone = History(MIB)
    for _ in range(20):
        alone.add("one", list(range(5000)))
    assert alone.size_bytes <= MIB // 2
    assert 2000 < alone.num_tokens <= MIB // 2 // BYTES_PER_TOKEN


def test_scopes_are_bounded_too_and_the_unused_go_first() -> None:
    history = History(64 * MIB)
    history.add("kept", [1, 2, 3])
    for number in range(MOST_SCOPES + 5):
        history.add(str(number), [1, 2, 3])
        assert history.of("kept") is not None
    assert history.of("0") is None
    assert history.evicted == 6


def test_a_history_survives_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "history"
    proposer = taught(History(MIB, folder=folder, vocabulary="v"))
    proposer.close()
    [path] = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = SuffixProposer(History(MIB, folder=folder, vocabulary="v"))
    assert chain(again, View([2, 3], scope="a")) == ANSWER[:5]
    assert chain(again, View([2, 3], arrival=2, scope="b")) == []
    other = SuffixProposer(History(MIB, folder=folder, vocabulary="w"))
    assert chain(other, View([2, 3], scope="a")) == []


def test_what_makes_room_is_written_first(tmp_path: Path) -> None:
    history = History(MIB, folder=tmp_path)
    for number in range(12):
        history.add(str(number), list(range(3000)))
    assert history.evicted > 0
    found = history.of("0")
    assert found is not None
    assert found.tokens()[:2] == [0, 1]


def test_it_is_saved_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    proposer = SuffixProposer(History(MIB, folder=tmp_path), clock=lambda: now[0])
    proposer.learn(View([1, 2, 3]), 1)
    assert not list(tmp_path.iterdir())
    now[0] = 1000.0
    proposer.learn(View([4, 5, 6]), 1)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other scope"])
def test_a_damaged_file_starts_empty_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taught(History(MIB, folder=tmp_path)).close()
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    scope = "b" if damage == "other scope" else "a"
    path.write_bytes({"cut": data[:-3], "empty": b""}.get(damage, bytes(data)))
    if damage == "other scope":
        taught(History(MIB, folder=tmp_path), scope="b").close()
        (target,) = (p for p in tmp_path.iterdir() if p != path)
        path.replace(target)
    with caplog.at_level(logging.WARNING):
        history = History(MIB, folder=tmp_path)
        assert history.of(scope) is None
    assert "starts empty" in caplog.text
    history.add(scope, [1, 2])  # and goes on
    history.save()
    assert History(MIB, folder=tmp_path).of(scope) is not None


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    taught(History(MIB, folder=tmp_path / "file" / "folder")).close()
    assert "could not be kept" in caplog.text
