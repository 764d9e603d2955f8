"""From generated text to the shapes of replies: pure functions and two small builders.

A streamed reply and a whole one are made from the same deltas by the same code, so they
say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from coppice.server.calls import Call
from coppice.server.generation import Delta, Generation, TokenScore

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity (a token that was forbidden), which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What is the same in every chunk of a reply."""

    call: Call
    object: str
    model: str
    fingerprint: str
    warnings: tuple[str, ...] = ()
    include_usage: bool = False

    def warn(self, more: tuple[str, ...]) -> Frame:
        """The same with more warnings."""
        return replace(self, warnings=self.warnings + more)

    def whole(self, choices: list[dict[str, Any]], generation: Generation) -> dict[str, Any]:
        """An unstreamed reply."""
        body = self._base(self.object, choices) | {"usage": usage(generation)}
        return body | ({"warnings": list(self.warnings)} if self.warnings else {})

    def chunk(self, choices: list[dict[str, Any]], *, first: bool = False) -> dict[str, Any]:
        """One streamed piece."""
        body = self._base(self.object, choices)
        if self.include_usage:
            body["usage"] = None
        if first and self.warnings:
            body["warnings"] = list(self.warnings)
        return body

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        """The last chunk when usage was asked for: no choices."""
        return self._base(self.object, []) | {"usage": usage(generation)}

    def _base(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.call.id,
            "object": kind,
            "created": self.call.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
        }


def usage(generation: Generation) -> dict[str, Any]:
    """Tokens read and written so far."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    accepted = generation.accepted_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": generation.drafted_tokens - accepted,
        },
    }


def chat_logprobs(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """The ``logprobs`` object of a chat choice."""

    def entry(raw: bytes, logprob: float) -> dict[str, Any]:
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    return {
        "content": [
            entry(score.text.bytes, score.logprob)
            | {"top_logprobs": [entry(raw, logprob) for raw, logprob in score.top]}
            for score in scores
        ]
    }


def completion_logprobs(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """The ``logprobs`` object of a completion choice; tokens that read alike keep the best."""
    made: dict[str, Any] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for score in scores:
        made["tokens"].append(score.text.text)
        made["token_logprobs"].append(_finite(score.logprob))
        made["text_offset"].append(score.text.offset)
        top: dict[str, float] = {}
        for raw, logprob in score.top:
            text = raw.decode("utf-8", "replace")
            top[text] = max(_finite(logprob), top.get(text, -math.inf))
        made["top_logprobs"].append(top)
    return made


@dataclass(slots=True)
class Gathered:
    """A choice put together from its deltas."""

    index: int
    texts: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Take one more piece."""
        self.texts.append(delta.text)
        self.scores.extend(delta.scores)
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
