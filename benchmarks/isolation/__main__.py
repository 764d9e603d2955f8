"""Render and compile here and in a cell, turn about, over real prompts' lengths.

    python -m benchmarks.isolation

What the cell adds is what a chat request pays for it: two frames over a socket pair, JSON of
the conversation, two changes of process; a thread, where the same was done before, is the row
"nothing, in a thread", and a request needed two. Medians and
quartiles of single calls, microseconds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from benchmarks.report import Goal, Report
from coppice.engine.grammar import GrammarCompiler
from coppice.engine.request import Grammar
from coppice.models.locate import BUNDLED, locate
from coppice.models.template import prepare_messages, render_chat
from coppice.models.tokenizer import Tokenizer
from coppice.server.cells import Cells
from coppice.server.text import TextService
from tests.kits.memory import memory_mib

ROUNDS, CONTEXT = 300, 1 << 20
TURNS = {"1 message": 1, "9 messages": 9, "99 messages": 99}
WORDS = "the quick brown fox jumps over the lazy dog and goes on to the sea. "


def conversation(turns: int) -> list[dict[str, Any]]:
    """Messages of about 270 characters, users and assistants in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": WORDS * 4} for i in range(turns)]


def schema(number: int) -> Grammar:
    """A small object schema; each number makes another."""
    fields = {f"field_{number}_{i}": {"type": "string", "maxLength": 40} for i in range(6)}
    return Grammar("json_schema", json.dumps({"type": "object", "properties": fields}))


async def compare(
    here: Callable[[int], object], there: Callable[[int], Awaitable[object]]
) -> tuple[list[float], list[float]]:
    """Seconds of each call made here and there, after ten of each for nothing."""
    made: tuple[list[float], list[float]] = ([], [])
    for number in range(-10, ROUNDS):
        began = time.perf_counter()
        here(number)
        between = time.perf_counter()
        await there(number)
        if number >= 0:
            made[0].append(between - began)
            made[1].append(time.perf_counter() - between)
    return made


def shown(seconds: list[float]) -> str:
    """Median and quartiles in microseconds."""
    low, middle, high = (1e6 * at for at in statistics.quantiles(seconds, n=4))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


async def measure(report: Report) -> None:
    """Fill the report."""
    tokenizer = Tokenizer.open(locate(BUNDLED))
    text = TextService(tokenizer)
    template = tokenizer.chat_template()
    assert template is not None
    worst = 0.0
    for name, turns in TURNS.items():
        messages = conversation(turns)

        def render(number: int, messages: list[dict[str, Any]] = messages) -> str:
            del number
            return render_chat(template, prepare_messages(template, messages), max_chars=CONTEXT)

        async def ask(number: int, messages: list[dict[str, Any]] = messages) -> str:
            del number
            return await text.render(messages, None, None, context=CONTEXT)

        assert render(0) == await ask(0)
        added = add_row(report, f"render, {name}", *await compare(render, ask))
        if turns < 99:  # long conversations pay for their own length, here and there
            worst = max(worst, added)
    add_row(
        report, "nothing, in a thread", *await compare(abs, lambda n: text.run(partial(abs, n)))
    )
    compiler = GrammarCompiler(tokenizer)
    added = add_row(
        report,
        "check, JSON schema of 6 fields",
        *await compare(lambda n: compiler.check(schema(n)), lambda n: text.check(schema(n))),
    )
    cells: dict[str, Cells] = {"templates": text._templates, "grammars": text._grammars}
    memory = {name: memory_mib(cell.pid)["Pss"] for name, cell in cells.items() if cell.pid}
    restart_s = await restart(cells["templates"], text)
    report.metrics |= {"pss_mib": memory, "restart_s": restart_s}
    for name, mib in memory.items():
        report.rows.append([f"memory of the cell for {name}, PSS", "", f"{mib:.1f} MiB", ""])
    report.rows.append(["from a kill to the next answer", "", f"{restart_s:.3f} s", ""])
    report.goals += [
        Goal.at_most("added to rendering 1 or 9 messages, median, ms", 1e3 * worst, 0.5),
        Goal.at_most("added to checking a grammar, median, ms", 1e3 * added, 0.5),
        Goal.at_most("memory of both cells, MiB", sum(memory.values()), 64),
    ]
    await text.close()


def add_row(report: Report, what: str, here: list[float], there: list[float]) -> float:
    """One line of the table; returns the median of what the cell adds, in seconds."""
    added = statistics.median(b - a for a, b in zip(here, there, strict=True))
    report.rows.append([what, shown(here), shown(there), f"{1e6 * added:.0f}"])
    report.metrics[what] = {"here_s": statistics.median(here), "added_s": added}
    return added


async def restart(cell: Cells, text: TextService) -> float:
    """Seconds that a conversation takes whose cell has just been killed."""
    taken = []
    for _ in range(5):
        assert cell._process is not None
        cell._process._process.kill()
        began = time.perf_counter()
        await text.render(conversation(1), None, None, context=CONTEXT)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> int:
    """Measure, print, keep."""
    report = Report("isolation", ["work", "here, us", "in a cell, us", "added, us"])
    asyncio.run(measure(report))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
