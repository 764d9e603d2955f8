"""Segment files against a dictionary: what comes back is what was written, or nothing."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coppice.cache.marks import Marks, PageKey
from coppice.cache.ram import PageBytes
from coppice.cache.segment import SegmentForm
from coppice.cache.segments import SegmentStore
from tests.kits.faulty_files import FaultyFiles

FORM = SegmentForm(b"f" * 32, page_size=4, page_bytes=1000, slots=3)
MARKS = Marks(b"s" * 32, b"model")


def page_of(number: int) -> tuple[PageKey, PageBytes]:
    key = MARKS.child(MARKS.root("tenant"), [number] * 4)
    return key, np.random.default_rng(number).integers(0, 256, 1000, np.uint8)


def open_store(folder: Path, form: SegmentForm = FORM, **kwargs: object) -> SegmentStore:
    more = {"bound_bytes": 6 * form.file_bytes, "max_age_s": 3600.0} | kwargs
    return SegmentStore(folder, form, **more).open()  # type: ignore[arg-type]


def read_one(store: SegmentStore, key: PageKey) -> PageBytes | None:
    (found,) = store.read([key])
    return found


class StoreMachine(RuleBasedStateMachine):
    """Pages are written, read, lost with old segments, found again after restarts, and damaged."""

    BOUND = 4 * FORM.file_bytes

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 1e9
        self.written: set[int] = set()
        self.damages = 0
        self.store = self.open()

    def open(self) -> SegmentStore:
        return open_store(
            Path(self.folder.name), bound_bytes=self.BOUND, max_age_s=100.0, now=lambda: self.now
        )

    @rule(number=st.integers(0, 30))
    def write(self, number: int) -> None:
        key, data = page_of(number)
        self.store.write(key, data)
        self.written.add(number)
        assert key in self.store
        if not self.damages:  # what was written last is not what is dropped
            assert np.array_equal(read_one(self.store, key), data)

    @rule(number=st.integers(0, 30))
    def read(self, number: int) -> None:
        key, data = page_of(number)
        known = key in self.store
        found = read_one(self.store, key)
        if found is not None:
            assert known and number in self.written and np.array_equal(found, data)
        else:
            assert not known or self.damages
            assert key not in self.store

    @rule()
    def restart(self) -> None:
        before = {n for n in range(31) if page_of(n)[0] in self.store}
        self.store.close()
        self.store = self.open()
        after = {n for n in range(31) if page_of(n)[0] in self.store}
        assert after == before or self.damages

    @rule(seconds=st.sampled_from([1.0, 30.0, 200.0, -50.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire()

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.files()))
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "delete"]))
        self.damages += 1
        if kind == "delete":
            path.unlink()
        elif kind == "cut":
            os.truncate(path, data.draw(st.integers(0, len(content))))
        elif content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1
            path.write_bytes(content)

    def files(self) -> list[Path]:
        return sorted(Path(self.folder.name, "coppice-kv").glob("*.kv"))

    @invariant()
    def bounded(self) -> None:
        assert sum(path.stat().st_size for path in self.files()) <= self.BOUND
        assert len(self.store) <= 4 * FORM.slots
        oldest = min((int(path.stem) for path in self.files()), default=None)
        assert oldest is None or oldest / 1e9 >= self.now - 101.0 or self.damages

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


StoreMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)
TestStore = StoreMachine.TestCase


def test_pages_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(8):
        store.write(*page_of(number))
    store.close()
    store = open_store(tmp_path)
    assert len(store) == 8
    for number in range(8):
        key, data = page_of(number)
        assert np.array_equal(read_one(store, key), data)
    store.close()


@pytest.mark.parametrize("rot", [0.0, 0.03])
def test_runs_are_read_at_once_and_come_out_in_order(tmp_path: Path, rot: float) -> None:
    files = FaultyFiles(3, rot=rot)
    store = open_store(tmp_path, bound_bytes=100 * FORM.file_bytes)
    order = [*range(40), 7, 3, 99, 5]
    for number in range(40):
        store.write(*page_of(number))
    store.close()
    store = open_store(tmp_path, bound_bytes=100 * FORM.file_bytes, files=files)
    rest, right = order, 0
    while rest:
        found = store.read([page_of(number)[0] for number in rest])
        for number, page in zip(rest, found, strict=False):
            assert page is None or np.array_equal(page, page_of(number)[1])
            assert page is not None or rot or number == 99
            right += page is not None
        rest = rest[len(found) :]
    assert right == 43 if not rot else 20 < right < 43
    store.close()


def test_nobody_else_may_look(tmp_path: Path) -> None:
    folder = tmp_path / "coppice-kv"
    folder.mkdir(mode=0o755)
    old = os.umask(0)
    try:
        store = open_store(tmp_path)
        store.write(*page_of(1))
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = sorted(path.name for path in folder.iterdir())
    assert {"lock", "secret"} < set(names) and len(names) == 3
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "coppice-kv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        open_store(tmp_path)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_second_server_does_not_write_into_the_same_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(BlockingIOError, match="another server"):
        open_store(tmp_path)
    store.close()
    open_store(tmp_path).close()


@pytest.mark.parametrize(
    "other",
    [
        SegmentForm(b"g" * 32, page_size=4, page_bytes=1000, slots=3),
        SegmentForm(b"f" * 32, page_size=8, page_bytes=1000, slots=3),
        SegmentForm(b"f" * 32, page_size=4, page_bytes=2000, slots=3),
    ],
    ids=["model", "page_size", "page_bytes"],
)
def test_pages_of_another_model_are_not_found_and_make_room(
    tmp_path: Path, other: SegmentForm
) -> None:
    store = open_store(tmp_path)
    store.write(*page_of(1))
    store.close()
    store = open_store(tmp_path, other, bound_bytes=6 * FORM.file_bytes)
    assert len(store) == 0 and store.size_bytes > 0
    data = np.zeros(other.page_bytes, np.uint8)
    for number in range(100):
        store.write(MARKS.child(b"p" * 16, [number] * other.page_size), data)
    assert store.size_bytes <= 6 * FORM.file_bytes
    assert len(list((tmp_path / "coppice-kv").glob("*.kv"))) <= 6
    store.close()


def test_a_folder_written_with_other_segment_sizes_is_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(5):
        store.write(*page_of(number))
    store.close()
    store = open_store(tmp_path, SegmentForm(b"f" * 32, page_size=4, page_bytes=1000, slots=7))
    for number in range(5):
        assert np.array_equal(read_one(store, page_of(number)[0]), page_of(number)[1])
    store.close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    note = tmp_path / "coppice-kv" / "note.txt"
    note.write_text("x" * 100_000)
    store = open_store(tmp_path, bound_bytes=FORM.file_bytes)
    for number in range(20):
        store.write(*page_of(number))
    assert note.exists()
    store.close()


def test_a_mark_is_not_enough(tmp_path: Path) -> None:
    """Equal marks of other tokens, or after another parent, never give a page."""
    store = open_store(tmp_path)
    key, data = page_of(1)
    store.write(key, data)
    assert read_one(store, key._replace(tokens=(9, 9, 9, 9))) is None
    store.write(key, data)
    assert read_one(store, key._replace(parent=b"x" * 16)) is None
    assert store.damaged == 2
    store.close()


def test_marks_depend_on_everything() -> None:
    key = MARKS.child(MARKS.root("a"), [1, 2, 3, 4])
    assert key == MARKS.child(MARKS.root("a"), [1, 2, 3, 4])
    others = {
        MARKS.child(MARKS.root("b"), [1, 2, 3, 4]).mark,
        MARKS.child(MARKS.root("a"), [1, 2, 3, 5]).mark,
        MARKS.child(key.mark, [1, 2, 3, 4]).mark,
        Marks(b"t" * 32, b"model").child(MARKS.root("a"), [1, 2, 3, 4]).mark,
        Marks(b"s" * 32, b"model2").root("a"),
        Marks(b"s" * 32, b"mode").root("la"),
    }
    assert len(others) == 6 and key.mark not in others


@pytest.mark.parametrize("seed", range(5))
def test_rotten_reads_give_the_page_or_nothing(tmp_path: Path, seed: int) -> None:
    store = open_store(tmp_path, bound_bytes=100 * FORM.file_bytes)
    for number in range(60):
        store.write(*page_of(number))
    store.close()
    files = FaultyFiles(seed)
    store = open_store(tmp_path, bound_bytes=100 * FORM.file_bytes, files=files)
    files._rot = 0.05
    right = 0
    for number in random.Random(seed).sample(range(60), 60):
        key, data = page_of(number)
        found = read_one(store, key)
        assert found is None or np.array_equal(found, data)
        right += found is not None
    assert files.faults and 20 < right < 60 and store.damaged == 60 - right
    store.close()
