"""No field is accepted and ignored without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coppice.errors import RequestError
from coppice.server.protocol.common import Fields

MAX_WARNINGS = 32

_UNBUILT: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "input_audio": (),
    "length_penalty": (1, 1.0),
    "lora": (),
    "min_completion_tokens": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields other servers know and this one does not, with the values that ask for nothing."""

_INSTEAD = {
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use regex",
    "guided_grammar": "use grammar",
    "guided_json": "use response_format",
    "guided_regex": "use regex",
    "structured_outputs": "use response_format, regex or grammar",
}


def review(body: Fields, *, strict: bool) -> list[str]:
    """Warnings about unknown fields, to be put into the reply.

    Raises:
        RequestError: a field asks for something not built, or, in strict mode, is unknown.
    """
    warnings = []
    for path, name, value in _extras(body, ""):
        if value is None:
            continue
        where = f"{path}{name}"[:200]
        if name in _UNBUILT:
            if value in _UNBUILT[name]:
                continue
            instead = _INSTEAD.get(name, "leave it out")
            raise RequestError(f"{where} is not supported; {instead}.", param=where,
                               code="unsupported_field")  # fmt: skip
        if strict:
            raise RequestError(f"{where} is not a known field.", param=where, code="unknown_field")
        warnings.append(f"unknown field {where!r} was ignored")
    return warnings[:MAX_WARNINGS]


def _extras(body: Fields, path: str) -> Iterator[tuple[str, str, Any]]:
    for name, value in (body.model_extra or {}).items():
        yield path, name, value
    for name in type(body).model_fields:
        yield from _nested(getattr(body, name), f"{path}{name}")


def _nested(value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, Fields):
        yield from _extras(value, f"{path}.")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if not isinstance(item, Fields | list):
                break  # lists are of one kind; token ids need no visit
            yield from _nested(item, f"{path}[{number}]")
