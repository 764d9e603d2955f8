"""What the Python API returns: one `RequestOutput` per prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from coppice.engine.messages import TokenLogprob


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` answers."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request: its prompt and its answers in order of ``index``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True
