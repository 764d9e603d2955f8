"""Taking tool calls apart while an answer streams.

What follows a `ToolFormat` becomes calls, what does not is content; nothing is ever
evaluated. The grammar that makes a model follow it is `coppice.engine.toolcalls`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The literal text of a call: ``opening NAME middle ARGUMENTS closing``.

    Attributes:
        trigger: the beginning of ``opening`` after which a call is the only way on.
        separator: between two calls; ``None`` when the format holds one call only.
        anywhere: whether a call may follow free text, or must begin the answer.
    """

    name: str
    trigger: str
    opening: str
    middle: str
    closing: str
    separator: str | None
    anywhere: bool


HERMES = ToolFormat(
    name="hermes",
    trigger="<tool_call>",
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    closing="}\n</tool_call>",
    separator="\n",
    anywhere=True,
)
"""Qwen 2.5, Qwen 3, Hermes and most others."""

PLAIN_JSON = ToolFormat(
    name="plain_json",
    trigger='{"name": "',
    opening='{"name": "',
    middle='", "parameters": ',
    closing="}",
    separator=None,
    anywhere=False,
)
"""Llama 3: the whole answer is one JSON object."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text outside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number ``index`` of the answer, to function ``name``."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are complete."""

    index: int


ToolEvent = ContentDelta | CallBegin | ArgumentsDelta | CallEnd


class ToolCallParser:
    """Takes an answer apart while it streams; any split of the text gives the same events.

    Whitespace before a call is dropped; text that might be the beginning of a call is held
    back until it is one or is not.

    Args:
        fmt: the format the grammar was made from.
        names: functions that may be called; others stay content.
    """

    def __init__(self, fmt: ToolFormat, names: frozenset[str]) -> None:
        self._format = fmt
        self._names = names
        self._buffer = ""
        self._state = "text" if fmt.anywhere else "start"
        self._blank = ""
        self._index = -1
        self._depth = 0
        self._quoted = False
        self._escaped = False

    @property
    def num_calls(self) -> int:
        """Calls begun so far."""
        return self._index + 1

    def push(self, text: str) -> list[ToolEvent]:
        """More of the answer."""
        self._buffer += text
        events: list[ToolEvent] = []
        steps = {
            "start": self._start,
            "text": self._text,
            "head": self._head,
            "arguments": self._arguments,
            "tail": self._tail,
            "content": self._content,
        }
        while steps[self._state](events):
            pass
        return events

    def finish(self) -> list[ToolEvent]:
        """The answer is over: release what was held back, unless it is half a call."""
        events: list[ToolEvent] = []
        held, self._buffer = self._buffer, ""
        if self._state == "tail":
            events.append(CallEnd(self._index))
        elif self._state in ("text", "start"):
            begun = held.lstrip().startswith(self._format.trigger)
            if held and not begun and not (self.num_calls and held.isspace()):
                events.append(ContentDelta(held))
        self._state = "content"
        return events

    def _start(self, events: list[ToolEvent]) -> bool:
        opening = self._format.opening
        if self._buffer.startswith(opening):
            self._buffer, self._state = self._buffer[len(opening) :], "head"
            return True
        if not opening.startswith(self._buffer):
            self._state = "content"
            return True
        return False

    def _text(self, events: list[ToolEvent]) -> bool:
        found = self._buffer.find(self._format.opening)
        if found >= 0:
            content = self._buffer[:found].rstrip()
            self._blank = self._buffer[len(content) : found]
            self._emit_content(content, events)
            self._buffer = self._buffer[found + len(self._format.opening) :]
            self._state = "head"
            return True
        keep = _held(self._buffer, self._format.opening)
        self._emit_content(self._buffer[: len(self._buffer) - keep], events)
        self._buffer = self._buffer[len(self._buffer) - keep :]
        return False

    def _head(self, events: list[ToolEvent]) -> bool:
        name, quote, _ = self._buffer.partition('"')
        rest, middle = self._buffer[len(name) :], self._format.middle + "{"
        known = name in self._names
        if known and rest.startswith(middle):
            self._index += 1
            events.append(CallBegin(self._index, name))
            self._buffer, self._state = rest[len(middle) - 1 :], "arguments"
            return True
        if (quote and not (known and middle.startswith(rest))) or len(name) > MAX_NAME:
            self._emit_content(self._blank + self._format.opening, events)
            self._state = "text" if self._format.anywhere else "content"
            return True
        return False

    def _arguments(self, events: list[ToolEvent]) -> bool:
        end = self._scan()
        if end:
            events.append(ArgumentsDelta(self._index, self._buffer[:end]))
            self._buffer = self._buffer[end:]
        if self._depth or not end:
            return False
        self._state = "tail"
        return True

    def _scan(self) -> int:
        """How much of the buffer belongs to the object; depth 0 after its last brace."""
        for i, char in enumerate(self._buffer):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return i + 1
        return len(self._buffer)

    def _tail(self, events: list[ToolEvent]) -> bool:
        closing = self._format.closing
        if self._buffer.startswith(closing):
            self._buffer = self._buffer[len(closing) :]
        elif closing.startswith(self._buffer):
            return False
        events.append(CallEnd(self._index))
        self._state = "text" if self._format.anywhere else "content"
        return True

    def _content(self, events: list[ToolEvent]) -> bool:
        self._emit_content(self._buffer, events)
        self._buffer = ""
        return False

    def _emit_content(self, text: str, events: list[ToolEvent]) -> None:
        if text:
            events.append(ContentDelta(text))


def parse_answer(fmt: ToolFormat, names: frozenset[str], text: str) -> list[ToolEvent]:
    """The events of a whole answer, neighbouring deltas merged."""
    parser = ToolCallParser(fmt, names)
    return merge_events([*parser.push(text), *parser.finish()])


def merge_events(events: Sequence[ToolEvent]) -> list[ToolEvent]:
    """Join neighbouring deltas of the same kind."""
    merged: list[ToolEvent] = []
    for event in events:
        last = merged[-1] if merged else None
        match last, event:
            case ContentDelta(before), ContentDelta(text):
                merged[-1] = ContentDelta(before + text)
            case ArgumentsDelta(i, before), ArgumentsDelta(j, text) if i == j:
                merged[-1] = ArgumentsDelta(i, before + text)
            case _:
                merged.append(event)
    return merged


def _held(text: str, opening: str) -> int:
    """Length of the longest suffix that is whitespace and then a beginning of ``opening``."""
    partial = 0
    for n in range(min(len(opening) - 1, len(text)), 0, -1):
        if text.endswith(opening[:n]):
            partial = n
            break
    head = text[: len(text) - partial]
    return partial + len(head) - len(head.rstrip())
