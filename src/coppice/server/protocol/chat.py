"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from coppice.engine.request import MAX_TOP_LOGPROBS
from coppice.server.protocol.common import (
    ContentLogprob,
    Count,
    Fields,
    Label,
    SamplingFields,
    Usage,
)

MAX_MESSAGES = 2048
MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(Fields):
    """A part of a message; only text is built."""

    type: Literal["text"]
    text: str


class FunctionCall(Fields):
    """A function's name and its arguments as JSON text."""

    name: str = Field(max_length=256)
    arguments: str


class ToolCall(Fields):
    """A call the model made in an earlier turn."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: Label | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)


class FunctionSpec(Fields):
    """A function the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool the model may use; types other than ``function`` are ignored with a warning."""

    type: Label
    function: FunctionSpec | None = None


class NamedFunction(Fields):
    """The name of a function."""

    name: FunctionName


class NamedToolChoice(Fields):
    """Call exactly this function."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``, and of its ``/render`` twin."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class ReplyFunction(BaseModel):
    """A call the model makes: name and JSON text of the arguments."""

    name: str
    arguments: str


class ReplyToolCall(BaseModel):
    """A tool call in a reply."""

    id: str
    type: Literal["function"]
    function: ReplyFunction


class ReplyMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ReplyToolCall] | None = None


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens."""

    content: list[ContentLogprob]


class ChatChoice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    stop_reason: str | int | None


class ChatReply(BaseModel):
    """An unstreamed chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    warnings: list[str] | None = None


class RenderReply(BaseModel):
    """The prompt a conversation becomes."""

    prompt: str
    tokens: list[int]
    count: int
    warnings: list[str] | None = None
