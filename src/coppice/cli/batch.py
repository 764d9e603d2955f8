"""Answering a file of requests: JSON lines in, JSON lines out, in the order of the input.

A line is either plain, ``{"prompt": ...}`` or ``{"messages": [...]}`` with sampling fields
beside it, or a line of OpenAI's batch format, whose request is under ``body``. A line that
cannot be served becomes an error line; the others are answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coppice.cli.console import print_note, track
from coppice.errors import ConfigError, CoppiceError, RequestError

if TYPE_CHECKING:
    from coppice import RequestOutput, SamplingParams
    from coppice.engine.config import EngineConfig

GROUP = 256
"""Lines handed to the engine at once: enough to keep every sequence slot busy."""

_REQUEST_KEYS = frozenset({"prompt", "messages"})
_ENVELOPE_KEYS = frozenset({"custom_id", "method", "url", "body"})
_URLS = frozenset({"/v1/completions", "/v1/chat/completions"})


class Generates(Protocol):
    """The part of `LLM` a batch needs."""

    def generate(self, prompts: Any, params: Any = None) -> list[RequestOutput]:
        """Complete prompts."""
        ...

    def chat(self, messages: Any, params: Any = None) -> list[RequestOutput]:
        """Answer conversations."""
        ...


@dataclass(slots=True)
class Line:
    """One request of the file and, later, its answer."""

    id: str
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: SamplingParams | None = None
    error: CoppiceError | None = None
    answer: RequestOutput | None = None


def run_file(
    config: EngineConfig, source: Path, target: Path, *, defaults: Mapping[str, Any]
) -> int:
    """Answer every line of ``source`` into ``target``; returns the exit code.

    Args:
        config: the engine to load.
        source: JSON lines.
        target: written as answers come; must not exist yet.
        defaults: sampling fields for lines that do not set them.

    Raises:
        ConfigError: a file cannot be read or written, or ``target`` exists.
    """
    from coppice.cli.load import load_llm

    lines = read_lines(source, defaults)
    if target.exists():
        raise ConfigError(f"{target} exists; remove it or name another --output.")
    llm = load_llm(config)
    failed = 0
    try:
        with target.open("x", encoding="utf-8") as sink:
            for line in track(answer_all(llm, lines), total=len(lines)):
                sink.write(json.dumps(to_json(line), ensure_ascii=False) + "\n")
                failed += line.error is not None
    except OSError as error:
        raise ConfigError(f"Cannot write {target}: {error}.") from error
    print_note(f"{len(lines) - failed} answered, {failed} refused; see {target}.")
    return 1 if failed else 0


def read_lines(source: Path, defaults: Mapping[str, Any]) -> list[Line]:
    """Parse the whole file; a wrong line carries its error instead of a request.

    Raises:
        ConfigError: the file cannot be read, is empty, or uses one id twice.
    """
    try:
        texts = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {source}: {error}.") from error
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise ConfigError(f"{source} holds no requests; write one JSON object per line.")
    lines = [_read_line(f"line-{number}", text, defaults) for number, text in numbered]
    seen: set[str] = set()
    for line in lines:
        if line.id in seen:
            raise ConfigError(f"{source} uses the id {line.id!r} twice; make ids unique.")
        seen.add(line.id)
    return lines


def _read_line(default_id: str, text: str, defaults: Mapping[str, Any]) -> Line:
    line = Line(default_id)
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise RequestError("A line must be a JSON object.")
        line.id = str(value.get("custom_id", default_id))
        _fill(line, _body(value), defaults)
    except CoppiceError as error:
        line.error = error
    except (ValueError, RecursionError) as error:
        line.error = RequestError(f"The line is not valid JSON: {error}.")
    return line


def _body(value: dict[str, Any]) -> dict[str, Any]:
    """The request inside the envelope of OpenAI's batch format, or the plain line itself."""
    if "body" not in value:
        return {key: item for key, item in value.items() if key != "custom_id"}
    unknown = sorted(set(value) - _ENVELOPE_KEYS)
    if unknown:
        raise RequestError(f"Unknown field {unknown[0]!r} beside 'body'; remove it.")
    if value.get("url", "/v1/completions") not in _URLS:
        raise RequestError(f"url must be one of {', '.join(sorted(_URLS))}.", param="url")
    if not isinstance(value["body"], dict):
        raise RequestError("body must be a JSON object.", param="body")
    # The model is the one this command loads; a batch file names its own.
    return {key: item for key, item in value["body"].items() if key != "model"}


def _fill(line: Line, body: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    import msgspec

    from coppice import SamplingParams

    if len(_REQUEST_KEYS & set(body)) != 1:
        raise RequestError("A request needs either 'prompt' or 'messages'.")
    fields = dict(defaults)
    fields |= {key: item for key, item in body.items() if key not in _REQUEST_KEYS}
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    known = set(SamplingParams.__struct_fields__)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise RequestError(f"Unknown field {unknown[0]!r}; remove it.", param=unknown[0])
    try:
        line.params = msgspec.convert(fields, SamplingParams)
        line.prompt = msgspec.convert(body.get("prompt"), str | list[int] | None)
        line.messages = msgspec.convert(body.get("messages"), list[dict[str, Any]] | None)
    except msgspec.ValidationError as error:
        raise RequestError(f"{error}.") from error


def answer_all(llm: Generates, lines: list[Line]) -> Iterator[Line]:
    """Answer lines in groups, so that they share steps; yields each in order, ended."""
    for start in range(0, len(lines), GROUP):
        group = lines[start : start + GROUP]
        ready = [line for line in group if line.error is None]
        _answer([line for line in ready if line.messages is None], llm.generate)
        _answer([line for line in ready if line.messages is not None], llm.chat)
        yield from group


def _answer(lines: list[Line], ask: Any) -> None:
    """Answer lines together; when one is refused, halve until it stands alone."""
    if not lines:
        return
    try:
        asked = [line.prompt if line.messages is None else line.messages for line in lines]
        outputs = ask(asked, [line.params for line in lines])
    except CoppiceError as error:
        if len(lines) == 1:
            lines[0].error = error
            return
        middle = len(lines) // 2
        _answer(lines[:middle], ask)
        _answer(lines[middle:], ask)
        return
    for line, output in zip(lines, outputs, strict=True):
        line.answer = output


def to_json(line: Line) -> dict[str, Any]:
    """One line of the output file: the answers, or the error and its stable code."""
    if line.error is not None or line.answer is None:
        error = line.error or CoppiceError("The request was not answered; run it again.")
        return {"custom_id": line.id, "error": {"code": error.code, "message": error.message}}
    answer = line.answer
    return {
        "custom_id": line.id,
        "choices": [
            {"index": item.index, "text": item.text, "finish_reason": item.finish_reason}
            for item in answer.outputs
        ],
        "usage": {
            "prompt_tokens": len(answer.prompt_token_ids),
            "completion_tokens": sum(len(item.token_ids) for item in answer.outputs),
        },
    }
