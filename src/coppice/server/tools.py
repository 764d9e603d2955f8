"""Tools: what the prompt shows, what the grammar allows, what the reply says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coppice.engine.request import Grammar
from coppice.errors import RequestError
from coppice.server import convert
from coppice.server.protocol.chat import ChatRequest


@dataclass(frozen=True, slots=True)
class Turn:
    """How the model may answer: the tools it sees and the constraint on its text."""

    tools: list[dict[str, Any]] | None = None
    grammar: Grammar | None = None


def plan_turn(body: ChatRequest) -> Turn:
    """Read tools, tool choice and response format.

    Raises:
        RequestError: they contradict each other.
    """
    if body.tools:
        raise RequestError("tools are not supported yet; leave them out.", param="tools")
    return Turn(grammar=convert.text_grammar(body))


class ToolText:
    """Splits one answer's text into content and tool calls, as it comes."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def push(self, text: str) -> list[dict[str, Any]]:
        """Deltas (``content`` or ``tool_calls``) that the new text brings."""
        return [{"content": text}] if text else []

    def finish(self) -> list[dict[str, Any]]:
        """What was held back."""
        return []

    def calls(self) -> list[dict[str, Any]]:
        """All calls so far, whole."""
        return []

    def finish_reason(self, reason: str) -> str:
        """``tool_calls`` instead of ``stop`` when there were calls."""
        return reason
