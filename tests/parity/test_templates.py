"""Chat templates render byte for byte as ``transformers`` renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coppice.errors import TemplateError
from coppice.models.template import prepare_messages, render_chat
from tests.kits import toy_tokenizers

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[1] / "fixtures" / "templates"
NAMES = ["llama3", "qwen25", "qwen3", "mistral", "gemma", "chatml", "phi3", "constructs"]
SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

SYSTEM = {"role": "system", "content": "  You speak like a pirate.\n"}
USER = {"role": "user", "content": 'What\'s the weather in Zürich? 🌦️ <b>&"quotes"</b>'}
ANSWER = {"role": "assistant", "content": "Sunny, arr! 你好 "}
AGAIN = {"role": "user", "content": "And\ttomorrow?\r\n{{ 7*7 }} {% raw %}"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nRain.", "name": "bo"}
ARGUMENTS = {"city": "Zürich", "days": [1, 2.5, None, True], "nested": {"b": 1, "a": "ü"}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": ARGUMENTS},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "content": '{"sky": "grey"}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather, in °C <units>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "array"}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, AGAIN],
    "system_turns": [SYSTEM, USER, ANSWER, AGAIN],
    "open": [USER, ANSWER],
    "thought": [USER, THOUGHT, AGAIN],
    "reasoning": [USER, {**ANSWER, "reasoning_content": "aye"}],
    "call": [USER, CALL],
    "result": [USER, CALL, RESULT],
    "result_answer": [SYSTEM, USER, CALL, RESULT, ANSWER, AGAIN],
    "two_results": [USER, CALL, RESULT, RESULT],
    "empty": [{"role": "user", "content": ""}],
    "bad_order": [ANSWER, ANSWER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " one "}]}],
}


@pytest.fixture(scope="module")
def reference():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=toy_tokenizers.byte_level(), **SPECIALS
    )


def both(reference, template, messages, **options):
    """(reference text or None, ours or None); ``None`` stands for a refusal."""
    try:
        expected = reference.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except Exception:  # the template's own refusal, or a field it needs
        expected = None
    kwargs = {key: options.pop(key) for key in ("date_string", "enable_thinking") if key in options}
    try:
        got = render_chat(template, messages, special_tokens=SPECIALS, options=kwargs, **options)
    except TemplateError:
        got = None
    return expected, got


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_transformers(reference, name):
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    rendered = 0
    for label, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL], [TOOL, TOOL]):
            for prompt in (True, False):
                for extra in ({"date_string": "1 Jan 2026"}, {"enable_thinking": False}):
                    expected, got = both(
                        reference,
                        template,
                        messages,
                        tools=tools,
                        add_generation_prompt=prompt,
                        **extra,
                    )
                    assert got == expected, (label, tools, prompt)
                    rendered += expected is not None
    assert rendered >= len(CONVERSATIONS) * 4  # most conversations are accepted


def test_prepared_openai_messages_render_as_plain_ones(reference):
    """Text parts and JSON arguments, as clients send them, equal the reference's plain form."""
    template = (FOLDER / "qwen25.jinja").read_text(encoding="utf-8")
    wire_call = json.loads(json.dumps(CALL))
    wire_call["tool_calls"][0]["function"]["arguments"] = json.dumps(ARGUMENTS)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    wire = [{"role": "user", "content": parts}, wire_call]
    got = render_chat(template, prepare_messages(template, wire), special_tokens=SPECIALS)
    expected = reference.apply_chat_template(
        [{"role": "user", "content": "a\nb"}, CALL],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert got == expected


def test_templates_that_read_parts_keep_them():
    gemma = (FOLDER / "gemma.jinja").read_text(encoding="utf-8")
    parts = CONVERSATIONS["parts"]
    assert prepare_messages(gemma, parts) == parts
    chatml = (FOLDER / "chatml.jinja").read_text(encoding="utf-8")
    assert prepare_messages(chatml, parts)[0]["content"] == " one "
