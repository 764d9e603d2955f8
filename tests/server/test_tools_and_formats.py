"""Tool calls and structured output, as far as the front end is concerned.

The scripted engine repeats the prompt, so a user who writes a tool call gets one.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.kits.server import ServerProcess

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town.",
        "parameters": {
            "type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"],
        },
    },
}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'


def ask(server: ServerProcess, content: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    # The tools in the prompt come after the message, so stop before they are repeated.
    fields = {"tools": [WEATHER], "max_tokens": len(content.encode()) + 7} | fields
    return server.client().chat.completions.create(model="fake", messages=messages, **fields)


def gather(stream: Any) -> tuple[str, list[dict[str, Any]], str]:
    content, calls, reason = "", [], ""
    for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


@pytest.mark.parametrize("text", [CALL, CALL + "\n" + CALL, f"so: {CALL}", "no call", CALL[:60]])
def test_streamed_tool_calls_equal_unstreamed(server: ServerProcess, text: str) -> None:
    fields = {"extra_body": {"stop_token_ids": [257]}}
    choice = ask(server, text, **fields).choices[0]
    content, calls, reason = gather(ask(server, text, stream=True, **fields))
    assert content == (choice.message.content or "")
    whole = [call.function.model_dump() for call in choice.message.tool_calls or ()]
    assert calls == whole
    assert reason == choice.finish_reason
    assert len(calls) == text.count("<tool_call>")


def test_a_whole_call_has_its_arguments_and_finish_reason(server: ServerProcess) -> None:
    choice = ask(server, CALL, extra_body={"stop_token_ids": [257]}).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls"
    assert call.id.startswith("call_") and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"town": "Köln"}


def test_without_tools_the_same_text_is_content(server: ServerProcess) -> None:
    for fields in ({"tools": openai.omit}, {"tool_choice": "none"}):
        message = ask(server, CALL, **fields).choices[0].message
        assert message.tool_calls is None and CALL[:40] in message.content


def test_tools_appear_in_the_prompt_and_calls_in_the_history(server: ServerProcess) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{
            "id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"town": "Bonn"}'},
        }]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sun."},
    ]  # fmt: skip
    with server.http() as http:
        body = {"messages": messages, "tools": [WEATHER]}
        rendered = http.post("/v1/chat/completions/render", json=body).json()["prompt"]
    assert '"name": "weather"' in rendered and "tool\nSun." in rendered


def test_tool_of_unknown_type_is_ignored_with_a_warning(server: ServerProcess) -> None:
    reply = ask(server, "hi", tools=[WEATHER, {"type": "web_search"}])
    assert any("web_search" in warning for warning in reply.warnings)


BAD: dict[str, dict[str, Any]] = {
    "choice of no tool": {"tool_choice": {"type": "function", "function": {"name": "x"}}},
    "required without tools": {"tools": [], "tool_choice": "required"},
    "two of one name": {"tools": [WEATHER, WEATHER]},
    "format and tools": {"response_format": {"type": "json_object"}},
    "name with spaces": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "strict schema not supported": {"tools": [{"type": "function", "function": {
        "name": "f", "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}},
    }}]},
    "schema too deep": {"tools": [{"type": "function", "function": {
        "name": "f", "parameters": json.loads('{"a":' * 40 + "1" + "}" * 40)}}]},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_tools_are_refused(server: ServerProcess, case: str) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(server, "hi", **BAD[case])


FORMATS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}},
    "object": {"response_format": {"type": "json_object"}},
    "text": {"response_format": {"type": "text"}},
    "regex": {"extra_body": {"regex": "[a-z]+"}},
    "grammar": {"extra_body": {"grammar": 'start: "a" | "b"'}},
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_formats_are_compiled_and_passed_on(server: ServerProcess, case: str) -> None:
    reply = ask(server, "hi", tools=openai.omit, **FORMATS[case])
    assert reply.choices[0].message.content


BAD_FORMATS: dict[str, dict[str, Any]] = {
    "schema missing": {"response_format": {"type": "json_schema"}},
    "unknown type": {"response_format": {"type": "xml"}},
    "impossible schema": {"response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "integer", "minimum": 3, "maximum": 2}}}},
    "unsupported keyword": {"response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "object", "$ref": "http://example.com/schema"}}}},
    "two constraints": {"extra_body": {"regex": "a", "grammar": "start: \"a\""}},
    "broken regex": {"extra_body": {"regex": "(("}},
    "look-around": {"extra_body": {"regex": "(?=a)b"}},
    "broken grammar": {"extra_body": {"grammar": "start ::= what"}},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FORMATS, ids=str)
def test_bad_formats_are_refused_before_the_engine(server: ServerProcess, case: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "hi", tools=openai.omit, **BAD_FORMATS[case])
    assert len(caught.value.message) > 20
