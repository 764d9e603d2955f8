"""Jobs in a process that may be killed: what they cost, whom they cost it, what they can reach."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from coppice.engine.cell_jobs import Check, Grammars, Render, Rendered, Templates
from coppice.engine.request import Grammar
from coppice.errors import CapacityError, GrammarError, RequestError, TemplateError
from coppice.models.template import RenderLimits, prepare_messages, render_chat
from coppice.server import cells as room
from coppice.server.cells import Cells, Kind
from tests.kits.memory import memory_mib

FOR = "{% for a in range(2000) %}{% for b in range(2000) %}{{ a }}{% endfor %}{% endfor %}"
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m.role }}: {{ m | tojson }}\n{% endfor %}{{ tools }}",
    "endless": FOR,
    "wide": "{{ 'a' * 4000000000 }}",
    "large": "{{ ('a' * 20000000) | length }}",
    "clock": "{{ strftime_now('%Y-%m-%d %H:%M') }}",
}
KIND = Kind("templates", 1.0, TemplateError, "Rendering the conversation")
SAY: list[Any] = [{"role": "user", "content": "hi"}]


def job(template: str, messages: list[Any] = SAY, *, max_chars: int = 1 << 20) -> Render:
    return Render(template, json.dumps((messages, None, None)), max_chars)


def templates(*, cap_s: float = 1.0) -> Cells:
    kind = Kind(KIND.name, cap_s, KIND.error, KIND.subject)
    return Cells(kind, lambda: Templates(TEMPLATES, {"eos_token": "</s>"}))


def run(story: Callable[[Cells], Awaitable[None]], cells: Cells) -> None:
    async def whole() -> None:
        try:
            await asyncio.wait_for(story(cells), 60)
        finally:
            await cells.close()

    asyncio.run(whole())


@contextlib.contextmanager
def capped(cells: Cells, cap_s: float) -> Iterator[None]:
    """Jobs asked for inside may take so long; a slow machine does not end the others."""
    kind, cells._kind = cells._kind, replace(cells._kind, cap_s=cap_s)
    try:
        yield
    finally:
        cells._kind = kind


async def text(cells: Cells, asked: Render, tenant: str = "") -> str:
    answer = await cells.ask(asked, tenant)
    assert isinstance(answer, Rendered)
    return answer.text


def test_a_cell_renders_what_would_be_rendered_here() -> None:
    messages = [
        {"role": "user", "content": "ü\u2028\U0001f600\0", "more": [10**40, -0.0, 1e-7, True]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "x": {"b": 1, "a": 2}},
    ]

    async def story(cells: Cells) -> None:
        template = TEMPLATES["plain"]
        there = await text(cells, job("plain", messages))
        assert there == render_chat(template, prepare_messages(template, messages))
        today = datetime.now()
        limits = RenderLimits(now=lambda: today)
        minutes = {await text(cells, job("clock")), render_chat(TEMPLATES["clock"], SAY,
                                                                limits=limits)}  # fmt: skip
        assert len(minutes) == 1 or today.second >= 58
        with pytest.raises(RequestError, match="surrogates"):
            await cells.ask(job("plain", [{"role": "user", "content": "\ud800"}]))
        with pytest.raises(TemplateError):
            await cells.ask(job("plain", [{"role": "user", "content": "a" * 4096}], max_chars=99))
        assert cells.starts == 1

    run(story, templates())


def test_an_endless_job_is_refused_in_time_and_costs_its_neighbour_no_more() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        began = time.monotonic()
        with capped(cells, 0.05):
            bomb = asyncio.create_task(cells.ask(job("endless", max_chars=1 << 40)))
            await asyncio.sleep(0)
        assert await text(cells, job("plain"), "neighbour")
        assert time.monotonic() - began < 0.05 + 2.0  # the cap, and another start
        with pytest.raises(TemplateError, match="takes more than"):
            await bomb
        assert cells.starts == 2
        began = time.thread_time()
        with pytest.raises(TemplateError, match="takes more than"):  # known by now
            await cells.ask(job("endless", max_chars=1 << 40))
        assert time.thread_time() - began < 0.05 and cells.starts == 2

    run(story, templates())


def test_the_meter_ends_it_where_the_clock_does_not() -> None:
    async def story(cells: Cells) -> None:
        with pytest.raises(TemplateError, match="limit"):
            await cells.ask(job("endless", max_chars=1 << 40))
        assert await text(cells, job("plain")) and cells.starts == 1

    run(story, templates(cap_s=20.0))


def test_a_job_that_takes_too_much_memory_is_refused_and_nothing_else() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        assert cells.pid is not None
        before = memory_mib(cells.pid)["Rss"]
        with pytest.raises(TemplateError):
            await cells.ask(job("wide", max_chars=1 << 40))
        assert memory_mib(cells.pid)["Rss"] < before + 256
        assert await text(cells, job("plain"))

    run(story, templates())


def test_a_cell_that_has_grown_makes_room_for_a_fresh_one() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        first = cells.pid
        large = [{"role": "user", "content": "a" * (50 << 20)}]
        with pytest.raises(TemplateError):
            await cells.ask(job("plain", large, max_chars=10 << 20))
        assert await text(cells, job("plain"))
        assert cells.pid != first and cells.starts == 2

    run(story, templates())


def test_who_ends_a_cell_from_outside_ends_nobodys_request() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        hit = 0
        for moment in range(6):
            asked = [asyncio.create_task(text(cells, job("plain"), str(i))) for i in range(4)]
            await asyncio.sleep(0.0003 * moment)
            if (pid := cells.pid) is not None:  # the last kill may have come after the answers
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hit += 1
            assert all(await asyncio.gather(*asked))
        assert hit >= 3

    run(story, templates())


def test_a_cell_that_stands_still_is_replaced() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        assert cells.pid is not None
        os.kill(cells.pid, signal.SIGSTOP)
        with pytest.raises(TemplateError, match=r"more than 0\.2 s"):
            await cells.ask(job("clock"))
        assert await text(cells, job("plain"))

    run(story, templates(cap_s=0.2))


def test_an_answer_nobody_waits_for_is_given_to_nobody() -> None:
    async def story(cells: Cells) -> None:
        for number in range(20):
            gone = asyncio.create_task(cells.ask(job("plain", [{"role": "user", "content": "x"}])))
            await asyncio.sleep(0.0001 * number)
            gone.cancel()
            mine = await text(cells, job("plain", [{"role": "user", "content": str(number)}]))
            assert f'"{number}"' in mine

    run(story, templates())


def test_tenants_take_turns() -> None:
    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        ended: list[str] = []

        async def ask(tenant: str) -> None:
            await cells.ask(job("plain"), tenant)
            ended.append(tenant)

        await asyncio.gather(*[ask("greedy") for _ in range(50)], ask("polite"))
        assert ended.index("polite") <= 2

    run(story, templates())


def test_a_crowd_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_WAITING", 3)

    async def story(cells: Cells) -> None:
        asked = [asyncio.create_task(cells.ask(job("plain"))) for _ in range(8)]
        made = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(one, Rendered) for one in made) >= 3
        refused = [one for one in made if isinstance(one, CapacityError)]
        assert refused and refused[0].status == 503 and refused[0].retry_after_s >= 1

    run(story, templates())


def test_a_cell_that_cannot_start_refuses_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(cells: Cells) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/nonexistent/python")
            with pytest.raises(CapacityError):
                await cells.ask(job("plain"))
        assert await text(cells, job("plain"))

    run(story, templates())


def grammars() -> Cells:
    tokens = [bytes([byte]) for byte in range(256)] + [b"", b"<|end|>"]
    setup = Grammars(tokens=tokens, eos_ids=(257,), special_ids=(256, 257), template=None)
    return Cells(Kind("grammars", 2.0, GrammarError, "Compiling the grammar"), lambda: setup)


def test_exploding_grammars_are_refused_within_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    bombs = [
        Grammar("regex", "(" * 200 + "a" + "{1,99})" * 200),
        Grammar("regex", "(.*a.{200}){50}" + ".*b.{2000}"),
        Grammar("grammar", "start: " + " | ".join(f"r{i}" for i in range(400)) + "\n"
                + "".join(f"r{i}: /(a|b){{{i},999}}.*[^c]{{9,999}}/\n" for i in range(400))),
        Grammar("json_schema", json.dumps({"type": "array", "maxItems": 10**9, "items": {
            "type": "string", "pattern": "(a|b|c){1,5000}.*x{1,5000}"}})),
        Grammar("json_schema", json.dumps({"type": "object", "properties": {
            f"p{i}": {"enum": [f"{i}{j}" * 3 for j in range(20)]} for i in range(100)}})),
    ]  # fmt: skip

    async def story(cells: Cells) -> None:
        starting, start = [0.0], cells._start

        async def timed_start() -> None:
            began = time.monotonic()
            await start()
            starting[0] += time.monotonic() - began

        monkeypatch.setattr(cells, "_start", timed_start)
        for number, bomb in enumerate(bombs):
            assert await cells.ask(Check(Grammar("regex", f"a{number}")))  # a cell is there
            began, starting[0] = time.monotonic(), 0.0
            try:
                await cells.ask(Check(bomb))
            except RequestError as error:
                assert isinstance(error, GrammarError)
            assert time.monotonic() - began - starting[0] < 2.5, bomb.source[:40]
        assert await cells.ask(Check(Grammar("regex", "a+")))

    run(story, grammars())


def test_a_slow_grammar_is_ended_by_the_clock() -> None:
    async def story(cells: Cells) -> None:
        names = [{f"p{i}{j}": {"type": "string"} for j in range(20)} for i in range(60)]
        schema = {"anyOf": [{"type": "object", "properties": each} for each in names]}
        assert await cells.ask(Check(Grammar("regex", "a")))
        with (
            capped(cells, 0.03),
            pytest.raises(GrammarError, match=r"takes more than 0\.03 s"),
        ):
            await cells.ask(Check(Grammar("json_schema", json.dumps(schema))))
        assert await cells.ask(Check(Grammar("regex", "a+")))

    run(story, grammars())


CONFINED = """
import socket
from coppice.engine.cell import confine
confine(32 << 20)
for what in (lambda: open("/etc/passwd"), socket.socket, lambda: bytearray(64 << 20)):
    try:
        what()
    except (OSError, MemoryError) as error:
        print(type(error).__name__, getattr(error, "errno", ""))
bytearray(16 << 20)
"""


def test_a_cell_reads_no_file_makes_no_connection_and_takes_no_more_memory() -> None:
    made = subprocess.run(
        [sys.executable, "-c", CONFINED], check=True, capture_output=True, text=True
    )
    assert made.stdout.split("\n") == ["OSError 24", "OSError 24", "MemoryError ", ""]


def test_a_cell_is_lean_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COPPICE_API_KEY", "a-secret-of-the-server")

    async def story(cells: Cells) -> None:
        await cells.ask(job("plain"))
        assert cells.pid is not None
        assert b"secret" not in Path(f"/proc/{cells.pid}/environ").read_bytes()
        maps = Path(f"/proc/{cells.pid}/maps").read_text()
        for heavy in ("torch", "numpy", "tokenizers", "_ssl"):
            assert heavy not in maps
        assert memory_mib(cells.pid)["Rss"] < 45
        files = {os.readlink(f) for f in Path(f"/proc/{cells.pid}/fd").iterdir()}
        assert sum(name.startswith("socket:") for name in files) <= 1 + (
            os.readlink("/proc/self/fd/2") in files
        )

    run(story, templates())
    run(story_of_grammars, grammars())


async def story_of_grammars(cells: Cells) -> None:
    await cells.ask(Check(Grammar("regex", "a")))
    assert cells.pid is not None
    assert "torch" not in Path(f"/proc/{cells.pid}/maps").read_text()
    assert memory_mib(cells.pid)["Rss"] < 60
