"""Tools: what the prompt shows, what the grammar allows, what the reply says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from coppice.engine.request import Grammar
from coppice.engine.tool_parser import ArgumentsDelta, CallBegin, ContentDelta, ToolEvent
from coppice.engine.toolcalls import ToolPlan
from coppice.errors import RequestError
from coppice.server import convert
from coppice.server.protocol.chat import ChatRequest, NamedToolChoice
from coppice.server.text import TextService


@dataclass(frozen=True, slots=True)
class Turn:
    """How the model may answer.

    Attributes:
        tools: what the prompt shows; ``None`` when there are none.
        grammar: the constraint on the answer's text.
        plan: how its calls are written, when calls may be made.
        warnings: what was taken less strictly than written.
    """

    tools: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None
    plan: ToolPlan | None = None
    warnings: tuple[str, ...] = ()


async def plan_turn(body: ChatRequest, text: TextService, tenant: str = "") -> Turn:
    """Read tools, tool choice and response format.

    Raises:
        RequestError: they contradict each other.
        GrammarError: a schema is over the limits, or strict and not supported.
    """
    grammar = convert.text_grammar(body)
    tools = convert.openai_tools(body.tools)
    choice: Any = body.tool_choice
    if isinstance(choice, NamedToolChoice):
        choice = {"type": "function", "function": {"name": choice.function.name}}
    parallel = body.parallel_tool_calls is not False
    plan = await text.plan_tools(tools, choice, parallel=parallel, tenant=tenant)
    if plan.grammar is not None and grammar is not None:
        raise RequestError(
            "tools cannot be combined with a format for the answer; set tool_choice to 'none'.",
            param="tools",
        )
    shown = [tool for tool in tools if tool["type"] == "function"]
    return Turn(shown or None, plan.grammar or grammar, plan, plan.warnings)


class ToolText:
    """Splits one answer's text into content and tool calls, as it comes.

    Args:
        turn: how the model may answer.
        answer: names this answer among all others; its calls' ids follow from it, so that
            they are the same when it is read again.
    """

    def __init__(self, turn: Turn, answer: str) -> None:
        self._answer = answer
        self._parser = turn.plan.parser() if turn.plan else None
        self._calls: list[dict[str, Any]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """Deltas (``content`` or ``tool_calls``) that the new text brings."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._deltas(self._parser.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """What was held back."""
        return self._deltas(self._parser.finish()) if self._parser else []

    def calls(self) -> list[dict[str, Any]]:
        """All calls so far, whole."""
        return self._calls

    def finish_reason(self, reason: str) -> str:
        """``tool_calls`` instead of ``stop`` when there were calls."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _deltas(self, events: Sequence[ToolEvent]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for event in events:
            match event:
                case ContentDelta(text):
                    made.append({"content": text})
                case CallBegin(index, name):
                    name_of_it = f"{self._answer}-{len(self._calls)}".encode()
                    call_id = f"call_{sha256(name_of_it).hexdigest()[:24]}"
                    function = {"name": name, "arguments": ""}
                    call = {"id": call_id, "type": "function", "function": function}
                    self._calls.append(call)
                    made.append(
                        {"tool_calls": [{"index": index, **call, "function": dict(function)}]}
                    )
                case ArgumentsDelta(index, text):
                    self._calls[index]["function"]["arguments"] += text
                    delta = {"index": index, "function": {"arguments": text}}
                    made.append({"tool_calls": [delta]})
        return made
