"""``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from coppice.engine.request import MAX_TOP_LOGPROBS
from coppice.server.protocol.common import SamplingFields, TokenId, Usage

MAX_PROMPTS = 128
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class CompletionLogprobs(BaseModel):
    """Log-probabilities, one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation; ``index`` is prompt number times ``n`` plus answer number."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "content_filter"]
    stop_reason: str | int | None


class CompletionReply(BaseModel):
    """An unstreamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    warnings: list[str] | None = None
