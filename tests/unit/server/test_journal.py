"""The journal's files: torn, damaged, full, tidied; and what is read back of them."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest

from coppice.engine.messages import Output, TokenLogprob
from coppice.engine.request import Request, SamplingParams
from coppice.errors import CapacityError, ConfigError
from coppice.server import segments
from coppice.server.journal import Accepted, Journal, Recorded, call_of
from coppice.server.moments import Moment
from coppice.server.resumable import Resumables
from coppice.server.segments import MAGIC, Segments


def accepted(call: str, n: int = 2) -> Accepted:
    request = Request(id=f"{call}-0", prompt=[1, 2, 3], sampling=SamplingParams(n=n, seed=7))
    return Accepted(
        call=call, request_id=f"http-{call}", route="/v1/completions", key="ann", tenant="a",
        created=1, deadline=Moment("boot", 1.0, 2.0), fingerprint="fp", requests=[request],
        body=b"{}",
    )  # fmt: skip


def output(call: str, tokens: list[int], index: int = 0, **fields: object) -> Output:
    return Output(request_id=f"{call}-0", index=index, tokens=tokens, **fields)  # type: ignore[arg-type]


async def read(folder: Path) -> list[Recorded]:
    journal = Journal(folder)
    try:
        return await journal.open()
    finally:
        await journal.close()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    async def play() -> list[Recorded]:
        journal = Journal(tmp_path)
        assert await journal.open() == []
        await journal.accept(accepted("one"))
        scores = [TokenLogprob(4, -0.5, [(4, -0.5)]), TokenLogprob(5, -0.1, [])]
        journal.hear("one", output("one", [4, 5], logprobs=scores, cached_tokens=2))
        journal.hear("one", output("one", [9], index=1, drafted=3, accepted=1))
        journal.hear("one", output("one", [6], finish_reason="stop", stop_token=6))
        await journal.accept(accepted("two"))
        journal.hear("two", output("two", [8]))
        journal.end("two", "finished")
        await journal.close()
        return await read(tmp_path)

    one, two = asyncio.run(play())
    assert one.accepted == accepted("one") and one.ended is None
    assert [(o.index, o.tokens, o.finish_reason) for o in one.outputs()] == [
        (0, [4, 5], None), (0, [6], "stop"), (1, [9], None),
    ]  # fmt: skip
    assert one.outputs()[0].logprobs == [TokenLogprob(4, -0.5, [(4, -0.5)]),
                                         TokenLogprob(5, -0.1, [])]  # fmt: skip
    assert (one.outputs()[0].cached_tokens, one.outputs()[2].drafted) == (2, 3)
    assert two.ended is not None and two.ended.outcome == "finished"
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_tokens_after_a_gap_do_not_count(tmp_path: Path) -> None:
    async def play() -> list[Recorded]:
        journal = Journal(tmp_path)
        await journal.open()
        await journal.accept(accepted("one"))
        journal.hear("one", output("one", [4]))
        journal._pending_bytes = 1 << 40  # a disk that does not keep up
        journal.hear("one", output("one", [5]))
        journal._pending_bytes = 0
        journal.hear("one", output("one", [6]))
        assert journal.left_out == 1
        await journal.close()
        return await read(tmp_path)

    (one,) = asyncio.run(play())
    assert [o.tokens for o in one.outputs()] == [[4]]


@pytest.mark.parametrize("seed", range(40))
def test_a_torn_or_damaged_tail_is_cut(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def write() -> None:
        journal = Journal(tmp_path)
        await journal.open()
        for call in ("one", "two", "three"):
            await journal.accept(accepted(call))
            for token in range(5):
                journal.hear(call, output(call, [token]))
        await journal.close()

    asyncio.run(write())
    (path,) = tmp_path.glob("segment-*")
    data = bytearray(path.read_bytes())
    rng = random.Random(seed)
    at = rng.randrange(len(MAGIC) + 1, len(data))
    if seed % 2:
        data[at] ^= 1 << rng.randrange(8)
    else:
        del data[at:]
    path.write_bytes(data)
    whole = len(MAGIC) + sum(len(segments.framed(body)) for body in segments._bodies(path))
    caplog.clear()
    found = asyncio.run(read(tmp_path))
    written = [accepted(call) for call in ("one", "two", "three")]
    assert [recorded.accepted for recorded in found] == written[: len(found)]
    for recorded in found:
        tokens = [token for o in recorded.outputs() for token in o.tokens]
        assert tokens == list(range(len(tokens)))
    assert ("cut at byte" in caplog.text) == (whole < len(data))


def test_a_full_disk_turns_the_journal_off_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = 600

    def write(file: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        some = min(room, len(data))
        room -= some
        return real(file, data[:some])

    real = os.write

    async def play() -> Journal:
        journal = Journal(tmp_path)
        await journal.open()
        monkeypatch.setattr(segments.os, "write", write)
        for number in range(20):
            await asyncio.wait_for(journal.accept(accepted(f"c{number}")), 5)
            journal.hear(f"c{number}", output(f"c{number}", [1]))
        assert not journal.on
        journal.end("c3", "finished")
        monkeypatch.undo()
        await journal.close()
        return journal

    asyncio.run(play())
    assert caplog.text.count("The journal is off") == 1 and "No space left" in caplog.text
    found = asyncio.run(read(tmp_path))
    assert 0 < len(found) < 20


def test_once_frozen_a_call_is_refused_for_the_next_process_would_not_know_it(
    tmp_path: Path,
) -> None:
    async def play() -> None:
        journal = Journal(tmp_path)
        await journal.open()
        streams = Resumables(journal, resume_s=1.0)
        await journal.accept(accepted("early"))
        streams.freeze()
        nobody: Any = None
        with pytest.raises(CapacityError, match="shutting down") as refused:
            streams.accept(accepted("late"), nobody, nobody)
        assert refused.value.code == "draining"
        await streams.close()

    asyncio.run(play())
    assert [r.accepted.call for r in asyncio.run(read(tmp_path))] == ["early"]


def test_files_whose_calls_are_dead_go(tmp_path: Path) -> None:
    async def play() -> int:
        journal = Journal(tmp_path, segment_bytes=2000)
        await journal.open()
        await journal.accept(accepted("lives"))
        journal.hear("lives", output("lives", [1, 2]))
        largest = 0
        for number in range(200):
            call = f"c{number}"
            await journal.accept(accepted(call))
            journal.hear(call, output(call, list(range(20))))
            journal.end(call, "finished")
            journal.forget(call)
            largest = max(largest, journal.size_bytes)
        journal.hear("lives", output("lives", [3]))
        await journal.close()
        return largest

    largest = asyncio.run(play())
    assert largest < 10_000 and len(list(tmp_path.glob("segment-*"))) <= 3
    lives = [r for r in asyncio.run(read(tmp_path)) if r.accepted.call == "lives"]
    assert [o.tokens for o in lives[0].outputs()] == [[1, 2], [3]]


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    first = Segments(tmp_path, call_of)
    with pytest.raises(ConfigError, match="its own folder"):
        Segments(tmp_path, call_of)
    first.close()
    Segments(tmp_path, call_of).close()


def test_files_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "segment-00000001").write_bytes(b"coppice journal 99\n...")
    with pytest.raises(ConfigError, match="not written by this version"):
        asyncio.run(read(tmp_path))
