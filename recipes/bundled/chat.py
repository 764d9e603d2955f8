"""Turn documents into conversations, so that the chat template means something."""

import ast
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from recipes.bundled.corpus import Document

Message = dict[str, str]
MAX_ANSWER_CHARS = 1_200
SENTENCE_END = re.compile('(?<=[.!?])[\u201d"\u2019]?\\s+(?=[\u201c"\u2018A-Z])')
SEEDS = Path(__file__).with_name("seeds.json")
CONTINUE = ("Continue: {}", "Continue the story: {}", "What happens next? {}")
WRITE = (
    "Write a Python function `{name}`: {what}",
    "Write a Python function called `{name}`. {what}",
    "Implement `{name}` in Python. {what}",
)


def render(messages: list[Message]) -> str:
    """Return the ChatML text of a conversation, as the chat template renders it."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def conversations(document: Document) -> Iterator[list[Message]]:
    """Yield the conversations made of one document, always the same ones."""
    rng = random.Random(document.name)
    maker = {"novels": _novel, "plays": _play, "python": _python}[document.source]
    yield from maker(document.text, rng)


def seed_conversations() -> list[list[Message]]:
    """Return short hand-written conversations: greetings, and what this model is."""
    seeds = json.loads(SEEDS.read_text(encoding="utf-8"))
    return [
        _pair(question, answer)
        for group in seeds
        for question in group["user"]
        for answer in group["assistant"]
    ]


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _novel(text: str, rng: random.Random) -> Iterator[list[Message]]:
    """Ask for the continuation of a sentence; answer with the next one to four."""
    for paragraph in text.split("\n\n"):
        sentences = [s.strip() for s in SENTENCE_END.split(paragraph) if s.strip()]
        if len(sentences) < 2 or rng.random() < 0.4:
            continue
        count = rng.randint(1, 4)
        answer = " ".join(sentences[1 : 1 + count])
        if len(sentences[0]) > 20 and 20 < len(answer) < MAX_ANSWER_CHARS:
            yield _pair(rng.choice(CONTINUE).format(sentences[0]), answer)


def _play(text: str, rng: random.Random) -> Iterator[list[Message]]:
    """Let consecutive speeches be the turns of a user and an assistant."""
    speeches = re.findall(r"^([A-Z][\w ]+):\n((?:.+\n?)+)", text, re.MULTILINE)
    at = 0
    while at + 1 < len(speeches):
        turns = 2 * rng.randint(1, 3)
        part = speeches[at : at + turns]
        at += turns
        roles = ("user", "assistant")
        talk = [{"role": roles[i % 2], "content": s.strip()} for i, (_, s) in enumerate(part)]
        talk = talk[: len(talk) // 2 * 2]
        if not talk or any(len(m["content"]) > MAX_ANSWER_CHARS for m in talk):
            continue
        if rng.random() < 0.5:
            name = part[1][0].title()
            talk.insert(0, {"role": "system", "content": f"You are {name}, in a play."})
        yield talk


def _python(text: str, rng: random.Random) -> Iterator[list[Message]]:
    """Ask for a documented function by its first sentence; answer with its source."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if not docstring or len(source) > MAX_ANSWER_CHARS:
            continue
        what = re.split(r"(?<=\.)\s|\n\n", docstring, maxsplit=1)[0].replace("\n", " ")
        if 8 < len(what) < 200:
            yield _pair(rng.choice(WRITE).format(name=node.name, what=what), _dedent(source))


def _dedent(source: str) -> str:
    """Shift a method to the left margin by its own indentation."""
    indent = len(source) - len(source.lstrip(" "))
    return "\n".join(
        line[indent:] if not line[:indent].strip() else line for line in source.split("\n")
    )
