"""From protocol shapes to the engine's: pure functions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from coppice.engine.request import Grammar, SamplingParams
from coppice.errors import ContextOverflowError, GrammarError, RequestError
from coppice.server.protocol.chat import ChatRequest, Message, Tool
from coppice.server.protocol.common import SamplingFields
from coppice.server.protocol.completions import CompletionRequest

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
DEFAULT_COMPLETION_TOKENS = 16
CHARS_PER_CONTEXT_TOKEN = 16


def sampling(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The sampling parameters of a call; absent and null fields take their defaults.

    Raises:
        RequestError: a value is out of range or two contradict.
    """
    given: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(fields, name)) is not None
    }
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    if max_tokens is not None and (fields.min_tokens or 0) > max_tokens:
        raise RequestError("min_tokens is larger than max_tokens.", param="min_tokens")
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        logit_bias=_logit_bias(fields.logit_bias or {}),
        logprobs=logprobs,
    )


_SAME_NAME = (
    "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "seed",
)  # fmt: skip


def fit(params: SamplingParams, prompt: Sequence[int], context: int) -> SamplingParams:
    """Complete the parameters for one prompt: its room for an answer, and a seed.

    Raises:
        ContextOverflowError: prompt and answer do not fit; both lengths are named.
    """
    room = context - len(prompt)
    if room < 1:
        raise ContextOverflowError(
            f"The prompt has {len(prompt)} tokens, but the context window holds {context} and "
            "at least one must be left for the answer; shorten the prompt.", param="prompt",
        )  # fmt: skip
    if params.max_tokens is not None and params.max_tokens > room:
        raise ContextOverflowError(
            f"The prompt has {len(prompt)} tokens and {params.max_tokens} were asked for, "
            f"together more than the context window of {context}; ask for at most {room}.",
            param="max_tokens",
        )
    if params.min_tokens > room:
        raise ContextOverflowError(
            f"The prompt has {len(prompt)} tokens and min_tokens is {params.min_tokens}, "
            f"together more than the context window of {context}.", param="min_tokens",
        )  # fmt: skip
    return msgspec.structs.replace(
        params,
        max_tokens=params.max_tokens if params.max_tokens is not None else room,
        seed=params.seed if params.seed is not None else secrets.randbits(63),
    )


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """What is wrong with the prompt is wrong with the field it was made from.

    Raises:
        RequestError: with ``param`` set to ``field`` where it was ``prompt``.
    """
    try:
        yield
    except RequestError as error:
        if error.param == "prompt":
            error.param = field
        raise


def check_ids(params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids the model does not have.

    Raises:
        RequestError: naming the field.
    """
    for field, ids in (
        ("prompt", prompt),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        highest = max(ids, default=0)
        if highest >= vocab_size:
            raise RequestError(
                f"{field} names token {highest}, but the vocabulary ends at {vocab_size - 1}.",
                param=field,
            )


def check_characters(characters: int, context: int) -> None:
    """Refuse text that cannot fit, before it costs anything to tokenize.

    Raises:
        ContextOverflowError: naming both lengths.
    """
    most = CHARS_PER_CONTEXT_TOKEN * context
    if characters > most:
        raise ContextOverflowError(
            f"The prompt has {characters} characters and at most {most} are tokenized for a "
            f"context window of {context} tokens; shorten it.", param="prompt",
        )  # fmt: skip


def session(fields: SamplingFields, tenant: str) -> str:
    """The engine's name of the session a call is a turn of, ``""`` for none; a tenant's own.

    Raises:
        RequestError: a tool is named and no session.
    """
    if fields.session_id is None:
        if fields.session_tool is not None:
            raise RequestError(
                "session_tool says what a session waits for; send session_id too.",
                param="session_tool",
            )
        return ""
    return session_of(tenant, fields.session_id)


def session_of(tenant: str, session_id: str) -> str:
    """The engine's name of a tenant's session."""
    return f"{tenant}\n{session_id}"


def chat_max_tokens(body: ChatRequest) -> int | None:
    """``max_completion_tokens`` and its older name ``max_tokens``."""
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; send one.", param="max_tokens"
        )
    return new if new is not None else old


def chat_logprobs(body: ChatRequest) -> int | None:
    """Top alternatives per token, or ``None`` when log-probabilities are off."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def completion_max_tokens(body: CompletionRequest) -> int:
    """``max_tokens`` with the default of the completions route."""
    return body.max_tokens if body.max_tokens is not None else DEFAULT_COMPLETION_TOKENS


def text_grammar(fields: SamplingFields) -> Grammar | None:
    """The constraint on the answer's text, if one was asked for.

    Raises:
        RequestError: more than one was.
        GrammarError: a schema over the limits.
    """
    found: list[Grammar] = []
    wanted = fields.response_format
    if wanted is not None and wanted.type == "json_object":
        found.append(Grammar("json_object", ""))
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise RequestError(
                "response_format of type json_schema needs json_schema.",
                param="response_format.json_schema",
            )
        schema = wanted.json_schema.schema_
        found.append(Grammar("json_schema", schema_text(schema, "response_format.json_schema")))
    if fields.regex is not None:
        found.append(Grammar("regex", fields.regex))
    if fields.grammar is not None:
        found.append(Grammar("grammar", fields.grammar))
    if len(found) > 1:
        raise RequestError(
            "Only one of response_format, regex and grammar can be used.", param="response_format"
        )
    return found[0] if found else None


def schema_text(schema: dict[str, Any], field: str) -> str:
    """A JSON schema as text, within the limits.

    Raises:
        GrammarError: larger than `MAX_SCHEMA_BYTES` or deeper than `MAX_SCHEMA_DEPTH`.
    """
    text = json.dumps(schema, ensure_ascii=False)
    if len(text.encode()) > MAX_SCHEMA_BYTES:
        raise GrammarError(
            f"The schema has more than {MAX_SCHEMA_BYTES} bytes; make it smaller.", param=field
        )
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise GrammarError(
            f"The schema is nested deeper than {MAX_SCHEMA_DEPTH}; flatten it.", param=field
        )
    return text


def openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain objects in OpenAI's form, known fields only.

    Raises:
        RequestError: a message has nothing to say, or calls tools without being the assistant.
    """
    made = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.content is None and not message.tool_calls:
            raise RequestError(f"{where} needs content.", param=f"{where}.content")
        if message.tool_calls and message.role != "assistant":
            raise RequestError(
                f"{where}: only an assistant makes tool calls.", param=f"{where}.tool_calls"
            )
        made.append(_openai_message(message))
    return made


def _openai_message(message: Message) -> dict[str, Any]:
    content: Any = message.content if message.content is not None else ""
    if isinstance(content, list):
        content = [{"type": "text", "text": part.text} for part in content]
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return made


def openai_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as plain objects in OpenAI's form, known fields only.

    Raises:
        GrammarError: the parameters' schema is over the limits.
    """
    made: list[dict[str, Any]] = []
    for number, tool in enumerate(tools or ()):
        plain: dict[str, Any] = {"type": tool.type}
        if (function := tool.function) is not None:
            plain["function"] = {"name": function.name}
            for name in ("description", "parameters", "strict"):
                if (value := getattr(function, name)) is not None:
                    plain["function"][name] = value
            if function.parameters is not None:
                schema_text(function.parameters, f"tools[{number}].function.parameters")
        made.append(plain)
    return made


def message_characters(messages: Sequence[Message]) -> int:
    """Characters of all contents, the estimate before rendering."""
    total = 0
    for message in messages:
        content = message.content or ""
        total += len(content) if isinstance(content, str) else sum(len(p.text) for p in content)
    return total


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    made: dict[int, float] = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):  # noqa: PLR2004
            raise RequestError(f"logit_bias: {name[:20]!r} is not a token id.", param="logit_bias")
        made[int(name)] = float(bias)
    return made


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0
