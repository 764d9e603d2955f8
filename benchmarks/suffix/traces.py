"""Recorded conversations as turns: what the model was shown, and what it then wrote.

Agents (coding, customer service with tools, question answering with search) and edits of
several rounds. Only what the model itself wrote counts as answer: tool results and users'
words are prompt. Call ids that a provider drew at random are left out.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[3] / "shared" / "data"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Turn:
    """One call of the model.

    Attributes:
        run: the conversation it belongs to.
        prompt: tokens shown.
        answer: tokens written, its end marker included.
    """

    run: str
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Trace:
    """Conversations in the order in which they were held.

    Attributes:
        agent: work of an agent, which the issue's goal is about.
        warm: how many runs at the beginning fill the history and are not counted.
    """

    name: str
    turns: list[Turn]
    agent: bool
    warm: int = 0


def load(encode: Encode, *, quick: bool, context: int) -> list[Trace]:
    """All traces; prompts are cut on the left to what fits ``context`` with the answer.

    Raises:
        FileNotFoundError: the data is not there.
    """
    if not DATA.is_dir():
        raise FileNotFoundError(
            f"The recorded traces are not at {DATA}; put the data folder there (a folder "
            "'shared' beside the repository) and run this again."
        )
    runs = {
        "swe_agent": (_swe_agent(), True, 1),
        "tau_bench": (_tau_bench(12 if quick else 48), True, 4),
        "react_hotpotqa": (_react(40 if quick else 220), True, 8),
        "edits": (_edits(12 if quick else 40), False, 0),
    }
    return [
        Trace(name, list(_turns(found, encode, context)), agent, warm)
        for name, (found, agent, warm) in runs.items()
    ]


Run = tuple[str, list[tuple[str, str]]]
"""A conversation: its name, and (role, text) of its messages."""


def _turns(runs: list[Run], encode: Encode, context: int) -> Iterator[Turn]:
    for name, messages in runs:
        shown: list[int] = []
        for role, text in messages:
            head = encode(f"<|{role}|>\n")
            body = encode(f"{text}\n<|end|>\n")
            if role == "assistant" and shown:
                answer = body[: context // 2]
                yield Turn(name, (shown + head)[-(context - len(answer)) :], answer)
            shown = shown + head + body


def _swe_agent() -> list[Run]:
    """Coding-agent runs: one issue worked on with six kinds of prompt and tools."""
    runs = []
    for path in sorted((DATA / "swe_agent").glob("*.traj.json.gz")):
        history = json.loads(_text(path))["history"]
        runs.append((path.name.split(".")[0], [_message(m) for m in history]))
    return runs


def _tau_bench(most: int) -> list[Run]:
    """Customer service with tools: trials of one task stay apart by all other tasks."""
    lines = _text(DATA / "tau_bench" / "airline_gpt4o.jsonl.gz").splitlines()
    found = sorted(map(json.loads, lines), key=lambda r: (r["trial"], r["task_id"]))
    tasks = sorted({r["task_id"] for r in found})[: most // 4]
    return [
        (f"{r['task_id']}.{r['trial']}", [_message(m) for m in r["traj"]])
        for r in found
        if r["task_id"] in tasks
    ]


def _react(most: int) -> list[Run]:
    """Think, act, observe: the model writes thoughts and actions, the search observes."""
    runs = []
    path = DATA / "react_hotpotqa" / "trajectories.jsonl.gz"
    for number, line in enumerate(_text(path).splitlines()[:most]):
        text = json.loads(line)["text"]
        parts = re.split(r"(?m)^(?=Thought \d+:|Observation \d+:)", text)
        messages = [("user", parts[0])]
        for part in parts[1:]:
            role = "assistant" if part.startswith("Thought") else "tool"
            messages.append((role, part.strip()))
        runs.append((str(number), messages))
    return runs


def _edits(most: int) -> list[Run]:
    """Rounds of edits: a reference solution, then the same with a name changed each time."""
    lines = (DATA / "humaneval" / "humaneval.jsonl").read_text().splitlines()
    runs = []
    for line in lines[:most]:
        task = json.loads(line)
        code = task["prompt"] + task["canonical_solution"]
        messages = [("user", f"Write this function.\n{task['prompt']}"), ("assistant", code)]
        names = [
            n for n in dict.fromkeys(re.findall(r"\b[a-z_]{3,}\b", task["canonical_solution"]))
        ]
        for number, name in enumerate([task["entry_point"], *names[-2:]]):
            code = re.sub(rf"\b{name}\b", f"{name}_{number}", code)
            messages += [
                ("user", f"Rename {name} to {name}_{number} and show the whole function."),
                ("assistant", code),
            ]
        runs.append((task["task_id"], messages))
    return runs


def _text(path: Path) -> str:
    with gzip.open(path, "rt") as file:
        return file.read()


def _message(message: dict[str, Any]) -> tuple[str, str]:
    """Role and text; calls of tools are text, as a model writes them."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content)
    for call in message.get("tool_calls") or ():
        function = call["function"]
        written = {"name": function["name"], "arguments": function["arguments"]}
        content += f"\n<tool_call>{json.dumps(written)}</tool_call>"
    return message["role"], content.strip()
