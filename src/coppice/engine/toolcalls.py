"""Tool calls: one definition of their text makes the grammar and the parser.

A `ToolFormat` spells out the literal text around a call's name and arguments. From it
`plan_tools` builds the grammar that forces a model's calls into that text, with each
function's argument schema enforced, and `ToolCallParser` takes the same text apart as it
streams.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coppice.engine.json_schema import check_schema
from coppice.engine.request import Grammar
from coppice.engine.tool_parser import HERMES, MAX_NAME, PLAIN_JSON, ToolCallParser, ToolFormat
from coppice.errors import GrammarError, RequestError

MAX_TOOLS = 128
MAX_CALLS = 32
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def format_for(template: str | None) -> ToolFormat:
    """The format a chat template asks its model for."""
    text = template or ""
    if HERMES.trigger not in text and '"parameters": dictionary' in text:
        return PLAIN_JSON
    return HERMES


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's tools shape its answer.

    Attributes:
        grammar: the constraint, or ``None`` when no call may be made.
        names: functions that may be called.
        warnings: what was taken less strictly than written, one sentence each.
    """

    grammar: Grammar | None
    format: ToolFormat
    names: frozenset[str]
    warnings: tuple[str, ...]

    def parser(self) -> ToolCallParser | None:
        """A parser for one answer, or ``None`` when no call may be made."""
        return None if self.grammar is None else ToolCallParser(self.format, self.names)


def plan_tools(
    tools: Sequence[Any],
    tool_choice: Any = None,
    *,
    parallel: bool = True,
    template: str | None = None,
) -> ToolPlan:
    """Turn OpenAI's ``tools`` and ``tool_choice`` into a grammar and a parser.

    Args:
        tools: as sent; entries of a type other than ``function`` are passed over.
        tool_choice: ``None`` (auto), ``"none"``, ``"auto"``, ``"required"`` or
            ``{"type": "function", "function": {"name": ...}}``.
        parallel: ``parallel_tool_calls``; more than one call per answer.
        template: the model's chat template, which decides the format.

    Returns:
        The plan; its ``warnings`` name tools passed over and schemas relaxed (only where a
        function is not ``strict``).

    Raises:
        RequestError: a tool or the choice is malformed, or names an unknown function.
        GrammarError: a ``strict`` function's schema is not supported.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"At most {MAX_TOOLS} tools are taken; send fewer.", param="tools")
    schemas: dict[str, Any] = {}
    warnings: list[str] = []
    for i, tool in enumerate(tools):
        function = _function_of(tool, i, warnings)
        if function is None:
            continue
        if function["name"] in schemas:
            raise RequestError(f"Two tools are named {function['name']!r}.", param="tools")
        schemas[function["name"]] = _arguments_schema(function, warnings)
    mode, only = _choice(tool_choice, schemas)
    fmt = format_for(template)
    if only is not None:
        schemas = {only: schemas[only]}
    if mode == "none" or not schemas:
        return ToolPlan(None, fmt, frozenset(), tuple(warnings))
    many = parallel and only is None
    grammar = Grammar("tools", _lark(fmt, schemas, free_text=mode == "auto", many=many))
    return ToolPlan(grammar, fmt, frozenset(schemas), tuple(warnings))


def _function_of(tool: Any, index: int, warnings: list[str]) -> dict[str, Any] | None:
    param = f"tools[{index}]"
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        raise RequestError(f"{param} must be an object with a type.", param=param)
    if tool["type"] != "function":
        warnings.append(f"{param} is of type {tool['type'][:64]!r}, unknown here, and was ignored.")
        return None
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{param}.function.name must be 1 to {MAX_NAME} letters, digits, '_', '-' or '.'.",
            param=param,
        )
    return function


def _arguments_schema(function: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """The schema to enforce; a lax function's unsupported one becomes any object."""
    name, schema = function["name"], function.get("parameters")
    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise RequestError(
            f"The parameters of tool {name!r} must be a JSON schema of type object.",
            param="tools",
        )
    schema = {**schema, "type": "object"}
    from llguidance import LLMatcher  # not for the HTTP process, which reads plans only

    from coppice.engine.grammar import schema_grammar

    try:
        check_schema(schema, "tools")
        error = LLMatcher.validate_grammar(schema_grammar(schema))
        if error and not error.startswith("WARNING"):
            raise GrammarError(error.splitlines()[0][:300], param="tools")
    except (GrammarError, ValueError) as problem:
        if function.get("strict"):
            raise GrammarError(
                f"The strict tool {name!r} cannot be enforced: {problem}", param="tools"
            ) from None
        warnings.append(f"Arguments of tool {name!r} are only held to be an object: {problem}")
        return {"type": "object"}
    return schema


def _choice(tool_choice: Any, schemas: dict[str, Any]) -> tuple[str, str | None]:
    """``(mode, the one function)``."""
    match tool_choice:
        case None | "auto":
            return "auto", None
        case "none":
            return "none", None
        case "required":
            if not schemas:
                raise RequestError(
                    "tool_choice is 'required' but there are no tools.", param="tool_choice"
                )
            return "required", None
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in schemas:
                raise RequestError(
                    f"tool_choice names {name[:64]!r}, which is not among the tools.",
                    param="tool_choice",
                )
            return "required", name
    raise RequestError(
        "tool_choice must be 'none', 'auto', 'required' or name one function.",
        param="tool_choice",
    )


def _lark(fmt: ToolFormat, schemas: dict[str, Any], *, free_text: bool, many: bool) -> str:
    from coppice.engine.grammar import JSON_OPTIONS

    rest = fmt.opening.removeprefix(fmt.trigger)
    repeat = ""
    if many and fmt.separator is not None:
        repeat = f" ({_quote(fmt.separator + fmt.trigger)} call){{0,{MAX_CALLS - 1}}}"
    if not free_text:
        start = f"start: {_quote(fmt.trigger)} call{repeat}"
    elif fmt.anywhere:
        start = f"start: TEXT | lead call{repeat}\nlead[lazy]: TEXT {_quote(fmt.trigger)}"
    else:
        start = f"start: OTHER | {_quote(fmt.trigger)} call"
    lines = ["%llguidance {}", start]
    if free_text and fmt.anywhere:
        lines.append(r"TEXT: /(.|\n)*/")
    elif free_text:
        lines.append(rf"OTHER: /(.|\n)*/ & ~/{_regex_quote(fmt.trigger)}(.|\n)*/")
    functions = [f"f{i}" for i in range(len(schemas))]
    body = f"({' | '.join(functions)}) {_quote(fmt.closing)}"
    lines.append(f"call: {_quote(rest)} {body}" if rest else f"call: {body}")
    for rule, (name, schema) in zip(functions, schemas.items(), strict=True):
        source = json.dumps({**schema, "x-guidance": JSON_OPTIONS})
        lines.append(f"{rule}: {_quote(name + fmt.middle)} %json {source}")
    return "\n".join(lines) + "\n"


def _quote(literal: str) -> str:
    return json.dumps(literal)


def _regex_quote(literal: str) -> str:
    return re.sub(r'[^A-Za-z0-9 ":,]', lambda m: "\\" + m.group(), literal)
