"""Chat templates: messages to the exact prompt text the model was trained on.

The text is byte-equal to what ``transformers`` renders. A template is a program from the
checkpoint, so it runs in a metered sandbox (`coppice.models.template_sandbox`) and ends in
`TemplateError` when it misbehaves. Clients cannot send templates, and of
``chat_template_kwargs`` only the names in `ALLOWED_KWARGS` reach one.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes

from coppice.errors import RequestError, TemplateError
from coppice.models.template_meter import DEFAULT_FUEL, DEFAULT_TIMEOUT_S, Meter, metered
from coppice.models.template_sandbox import build_environment

MAX_TEMPLATE_CHARS = 256 << 10
MAX_OPTION_CHARS = 64
ALLOWED_KWARGS: Mapping[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "reasoning_effort": str,
    "date_string": str,
    "tools_in_user_message": bool,
}
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_T = TypeVar("_T")
_COMPILE_CHARS = 4 << 20
_COMPILE_TIMEOUT_S = 10.0


class RenderLimits:
    """How much one rendering may spend.

    Args:
        fuel: operations (64 characters touched count as one).
        timeout_s: wall-clock seconds.
        now: the clock ``strftime_now`` reads.
    """

    def __init__(
        self,
        fuel: int = DEFAULT_FUEL,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        self.fuel = fuel
        self.timeout_s = timeout_s
        self.now = now


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    max_chars: int = 1 << 20,
    limits: RenderLimits | None = None,
) -> str:
    """Render a conversation as the model's prompt text.

    Args:
        template: the checkpoint's Jinja text (`Tokenizer.chat_template`).
        messages: plain JSON objects, as `prepare_messages` returns them.
        tools: JSON schemas of the tools, or ``None``.
        add_generation_prompt: end with the header of an assistant message.
        special_tokens: ``Tokenizer.special_tokens``.
        options: the request's ``chat_template_kwargs``.
        max_chars: cap on the text (and, loosely, on every value made on the way).
        limits: fuel, time and clock; the defaults are right outside tests.

    Raises:
        TemplateError: the template is broken, refuses the messages, or passes a cap.
        RequestError: an option is not in `ALLOWED_KWARGS`.
    """
    if not messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    variables = {
        **(special_tokens or {}),
        **_check_options(options or {}),
        "messages": [_plain_message(message) for message in messages],
        "tools": None if tools is None else _plain(list(tools)),
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
    }
    limits = limits or RenderLimits()
    meter = Meter(max_chars, limits.fuel, limits.timeout_s)
    return _guarded(lambda: _render(template, variables, meter, limits.now))


def check_template(template: str) -> None:
    """Compile a template once, at load, so that a broken one is found before a request.

    Raises:
        TemplateError: it does not compile or uses something the sandbox does not allow.
    """
    _guarded(lambda: _compiled(template, datetime.datetime.now))


def prepare_messages(template: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bring messages in the OpenAI form into the form templates expect.

    Content given as a list of text parts becomes one string (parts joined by a line break)
    unless the template reads lists itself, and tool call arguments given as JSON text become
    the object they spell.

    Raises:
        RequestError: a part is not text.
    """
    keep_parts = _guarded(lambda: reads_content_parts(template))
    return [_prepare(dict(message), keep_parts) for message in messages]


@functools.lru_cache(maxsize=16)
def reads_content_parts(template: str) -> bool:
    """Whether the template loops over a message's content, or a variable of that name."""
    with metered(Meter(_COMPILE_CHARS, DEFAULT_FUEL, _COMPILE_TIMEOUT_S)):
        tree = jinja2.Environment.parse(build_environment(), template)
    return any(
        _field(part) == "content"
        for loop in tree.find_all(nodes.For)
        for part in [loop.iter, *loop.iter.find_all((nodes.Getattr, nodes.Getitem))]
        if not isinstance(loop.iter, nodes.Call)
    )


def _field(node: nodes.Node) -> str | None:
    """The field or variable a loop walks over."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None


def _prepare(message: dict[str, Any], keep_parts: bool) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise RequestError(
                    "Only text content parts are supported; send content as text.",
                    param="messages",
                )
        if not keep_parts:
            message["content"] = "\n".join(part["text"] for part in content)
    if message.get("tool_calls"):
        message["tool_calls"] = [_prepare_call(call) for call in message["tool_calls"]]
    return message


def _prepare_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return dict(call)  # a model may have written broken JSON; the template sees it as text
    if not isinstance(arguments, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        kind = ALLOWED_KWARGS.get(name)
        if kind is None:
            raise RequestError(
                f"chat_template_kwargs.{name[:MAX_OPTION_CHARS]} is not supported; use one of "
                f"{', '.join(ALLOWED_KWARGS)}.",
                param="chat_template_kwargs",
            )
        too_long = isinstance(value, str) and len(value) > MAX_OPTION_CHARS
        if not isinstance(value, kind) or too_long:
            raise RequestError(
                f"chat_template_kwargs.{name} must be a {kind.__name__}"
                f"{f' of at most {MAX_OPTION_CHARS} characters' if kind is str else ''}.",
                param="chat_template_kwargs",
            )
    return dict(options)


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values, no nulls, and reasoning under both names templates read."""
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Rebuild from exact JSON types, so that no object with methods reaches a template."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise RequestError(
        f"Messages and tools must be plain JSON; {type(value).__name__} is not.", param="messages"
    )


def _render(
    template: str,
    variables: dict[str, Any],
    meter: Meter,
    now: Callable[[], datetime.datetime],
) -> str:
    compiled = _compiled(template, now)
    with metered(meter):
        parts, size = [], 0
        for part in compiled.generate(variables):
            size += len(part)
            meter.require_prompt(size)
            parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=16)
def _compiled(template: str, now: Callable[[], datetime.datetime]) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateError(
            f"The chat template is longer than {MAX_TEMPLATE_CHARS} characters; use a smaller one."
        )
    # Compiling folds constants, so it needs a meter of its own.
    with metered(Meter(_COMPILE_CHARS, DEFAULT_FUEL, _COMPILE_TIMEOUT_S)):
        return build_environment(now).from_string(template)


def _guarded(action: Callable[[], _T]) -> _T:
    """Run foreign code; whatever it raises becomes a `TemplateError`."""
    try:
        return action()
    except (TemplateError, RequestError):
        raise
    except RecursionError as error:
        raise TemplateError("The chat template is nested too deeply; use a flatter one.") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"The chat template does not compile (line {error.lineno}): {str(error)[:200]}."
        ) from error
    except Exception as error:  # a template may raise anything at all
        raise TemplateError(
            f"The chat template failed ({type(error).__name__}: {str(error)[:200]}); check the "
            "messages' roles and fields against the model's template."
        ) from error
