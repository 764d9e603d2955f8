"""Tool calls: the grammar forces what the parser reads; splits, choices, refusals."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.engine.grammar import GrammarCompiler
from coppice.engine.tool_parser import (
    HERMES,
    PLAIN_JSON,
    ArgumentsDelta,
    CallBegin,
    CallEnd,
    ContentDelta,
    ToolCallParser,
    merge_events,
    parse_answer,
)
from coppice.engine.toolcalls import format_for, plan_tools
from coppice.errors import GrammarError, RequestError

LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of arguments}'
QWEN = "within <tool_call></tool_call> XML tags"


def tool(name: str, strict: bool = False, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", city={"type": "string"}), tool("add", a={"type": "integer"})]
NAMES = frozenset({"weather", "add"})


class ByteTokenizer:
    eos_ids = (0,)
    special_ids = frozenset({0})
    tokens = (b"<eos>", *(bytes([i]) for i in range(256)))
    vocab_size = 257

    def token_bytes(self, token):
        return self.tokens[token]

    def encode(self, text, *, add_special_tokens=True):
        return [b + 1 for b in text.encode()]


COMPILER = GrammarCompiler(ByteTokenizer())


def walk(plan, text: str) -> tuple[int, bool]:
    """``(bytes taken, whether the answer may end there)``."""
    state = COMPILER.compile(plan.grammar)
    for i, byte in enumerate(text.encode()):
        mask = state.mask()
        if not (int(mask[(byte + 1) // 32]) >> ((byte + 1) % 32)) & 1:
            return i, False
        state.accept(byte + 1)
    return len(text.encode()), state.is_complete


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ONE = call("weather", '{"city": "Oslo"}')
TWO = ONE + "\n" + call("add", '{"a": 2}')


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("just text", True),
        ("a < b, <tool, </tool_call>", True),
        ("Let me see.\n" + ONE, True),
        (TWO, True),
        ("text <tool_call>", False),
        (ONE[:-3], False),
    ],
)
def test_auto_allows_text_and_well_formed_calls(text, ends):
    assert walk(plan_tools(TOOLS, template=QWEN), text) == (len(text), ends)


@pytest.mark.parametrize(
    "text",
    [
        call("rm_rf", "{}"),
        call("weather", '{"town": "Oslo"}'),
        call("weather", "[]"),
        call("add", '{"a": "2"}'),
        ONE + " and more",
        "<tool_call> hello",
    ],
)
def test_auto_refuses_a_malformed_call(text):
    taken, _ = walk(plan_tools(TOOLS), text)
    assert taken < len(text)


def test_required_named_and_single_calls():
    required = plan_tools(TOOLS, "required")
    assert walk(required, "text")[0] == 0
    assert walk(required, TWO) == (len(TWO), True)
    single = plan_tools(TOOLS, "required", parallel=False)
    assert walk(single, TWO) == (len(ONE), False)
    named = plan_tools(TOOLS, {"type": "function", "function": {"name": "add"}})
    text = call("add", '{"a": 1}')
    assert walk(named, text) == (len(text), True)
    assert walk(named, ONE)[0] < len(ONE)


def test_none_and_no_tools_constrain_nothing():
    for plan in (plan_tools(TOOLS, "none"), plan_tools([]), plan_tools([], "auto")):
        assert plan.grammar is None
        assert plan.parser() is None


def test_llama_templates_use_plain_json():
    assert format_for(LLAMA) is PLAIN_JSON
    assert format_for(QWEN) is HERMES
    assert format_for(None) is HERMES
    plan = plan_tools(TOOLS, template=LLAMA)
    text = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    assert walk(plan, text) == (len(text), True)
    for prose in ("hello", '{"key": 1}', 'Use {"name": "x"}'):
        assert walk(plan, prose) == (len(prose), True)
    assert walk(plan, '{"name": "nope')[0] == len('{"name": "')
    assert parse_answer(PLAIN_JSON, NAMES, text) == [
        CallBegin(0, "weather"),
        ArgumentsDelta(0, '{"city": "Oslo"}'),
        CallEnd(0),
    ]
    assert parse_answer(PLAIN_JSON, NAMES, '{"key": 1}') == [ContentDelta('{"key": 1}')]


def test_a_whole_answer():
    assert parse_answer(HERMES, NAMES, "Hm.\n" + TWO) == [
        ContentDelta("Hm."),
        CallBegin(0, "weather"),
        ArgumentsDelta(0, '{"city": "Oslo"}'),
        CallEnd(0),
        CallBegin(1, "add"),
        ArgumentsDelta(1, '{"a": 2}'),
        CallEnd(1),
    ]


def test_braces_and_quotes_inside_strings_do_not_end_the_arguments():
    arguments = '{"city": "}\\"]{ \\\\", "b": {"c": [1, {}]}}'
    events = parse_answer(HERMES, NAMES, call("weather", arguments))
    assert events[1] == ArgumentsDelta(0, arguments)
    assert events[2] == CallEnd(0)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a <tool", "a <tool"),
        ("a  ", "a  "),
        ("a <tool_call>\nno", "a <tool_call>\nno"),
        (call("unknown", "{}"), call("unknown", "{}")),
        ("  " + call("unknown", "{}") + "\n" + ONE, "  " + call("unknown", "{}")),
        (call("weather", "5"), call("weather", "5")),
        ("a <tool_call>\n", "a"),
    ],
)
def test_what_is_not_a_call_is_content(text, content):
    events = parse_answer(HERMES, NAMES, text)
    got = "".join(e.text for e in events if isinstance(e, ContentDelta))
    assert got.rstrip() == content.rstrip()


def test_a_partial_tag_is_never_shown():
    parser = ToolCallParser(HERMES, NAMES)
    shown = ""
    for char in "Look: " + ONE:
        for event in parser.push(char):
            if isinstance(event, ContentDelta):
                shown += event.text
                assert "<" not in shown
    assert shown == "Look:"
    assert parser.finish() == []
    assert parser.num_calls == 1


def test_a_call_cut_short_is_not_ended():
    for n in range(len(ONE)):
        events = parse_answer(HERMES, NAMES, ONE[:n])
        complete = n >= ONE.index("}") + 1
        assert (CallEnd(0) in events) == complete


PIECES = st.lists(
    st.sampled_from(
        [
            *("text", " ", "\n", "<", "<tool", "<tool_call>", "<tool_call>\n", '{"name": "', "}"),
            *('weather", "arguments": ', '{"a": "\\""}', "}\n</tool_call>", "é", '"', ONE, TWO),
        ]
    ),
    max_size=8,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=PIECES, seed=st.integers(0, 2**32), fmt=st.sampled_from([HERMES, PLAIN_JSON]))
def test_any_split_gives_the_same_events(text, seed, fmt):
    rng = random.Random(seed)
    parser, events, at = ToolCallParser(fmt, NAMES), [], 0
    while at < len(text):
        step = rng.choice([1, 1, 2, 3, 7, 30])
        events += parser.push(text[at : at + step])
        at += step
    events += parser.finish()
    assert merge_events(events) == parse_answer(fmt, NAMES, text)


def test_tools_of_unknown_type_are_passed_over_with_a_warning():
    plan = plan_tools([{"type": "web_search"}, *TOOLS])
    assert plan.names == NAMES
    assert "web_search" in plan.warnings[0]
    assert plan_tools([{"type": "web_search"}]).grammar is None


def test_an_unsupported_schema_is_refused_when_strict_and_relaxed_otherwise():
    lax = plan_tools([tool("f", a={"not": {}})], "required")
    assert "'not'" in lax.warnings[0]
    text = call("f", '{"anything": 1}')
    assert walk(lax, text) == (len(text), True)
    with pytest.raises(GrammarError, match="'not'"):
        plan_tools([tool("f", strict=True, a={"not": {}})])
    with pytest.raises(GrammarError, match="oneOf"):
        overlapping = {"oneOf": [{"type": "number"}, {"type": "integer"}]}
        plan_tools([tool("f", strict=True, a=overlapping)])


def test_a_function_without_parameters_takes_none():
    plan = plan_tools([{"type": "function", "function": {"name": "now"}}], "required")
    assert walk(plan, call("now", "{}"))[1]
    assert walk(plan, call("now", '{"a": 1}'))[0] < 60


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([5], None, "tools\\[0\\]"),
        ([{"function": {}}], None, "type"),
        ([{"type": "function"}], None, "name"),
        ([{"type": "function", "function": {"name": 'a"b'}}], None, "name"),
        ([{"type": "function", "function": {"name": "x" * 65}}], None, "name"),
        ([*TOOLS, TOOLS[0]], None, "Two tools"),
        ([TOOLS[0]] * 129, None, "128"),
        ([], "required", "no tools"),
        (TOOLS, "sometimes", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "nope"}}, "nope"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], None, "schema"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
            None,
            "object",
        ),
    ],
)
def test_malformed_tools_are_refused(tools, choice, says):
    with pytest.raises(RequestError, match=says):
        plan_tools(tools, choice)


def test_parsed_arguments_are_valid_json_under_the_grammar():
    """Random walks of the grammar itself: whatever it allows, the parser takes apart."""
    plan = plan_tools([tool("pick", n={"type": "integer"}, s={"enum": ["a", "b"]})], "required")
    rng = random.Random(4)
    ended = 0
    for _ in range(10):
        state, text = COMPILER.compile(plan.grammar), b""
        for _ in range(400):
            mask = state.mask()
            choices = [t for t in range(257) if (int(mask[t // 32]) >> (t % 32)) & 1]
            token = 0 if 0 in choices else rng.choice(choices)
            state.accept(token)
            if token == 0:
                break
            text += bytes([token - 1])
            if state.is_stopped:
                break
        else:
            continue
        ended += 1
        events = parse_answer(plan.format, plan.names, text.decode())
        assert [type(e) for e in events] == [CallBegin, ArgumentsDelta, CallEnd]
        assert set(json.loads(events[1].text)) == {"n", "s"}
    assert ended >= 5
