"""Fields that chat completions and completions share, and the shapes of replies to both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from coppice.engine.request import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP,
    MAX_STOP_BYTES,
    SpeculateHow,
)

TOKEN_ID_LIMIT, TOKEN_ID_TITLE = 2**31, "Token id"
TokenId = Annotated[int, Field(ge=0, lt=TOKEN_ID_LIMIT, title=TOKEN_ID_TITLE)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_BYTES)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Label = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f]*$")]
"""A name the server keeps or compares: no control characters."""
Name = Annotated[Label, Field(min_length=1)]

ERROR_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


class Fields(BaseModel):
    """Base of request shapes: types are not coerced; unknown names are kept to be reported."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Fields):
    """Options of a streamed reply."""

    include_usage: bool = False


class JsonSchemaFormat(Fields):
    """A named JSON schema."""

    name: Label = "schema"
    description: str | None = Field(None, max_length=65536)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """How the text must look: free, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class SamplingFields(Fields):
    """How tokens are chosen, and how the engine treats the request."""

    model: Label | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    max_tokens: Count | None = None
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_LOGIT_BIAS
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_LOGIT_BIAS)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, min_length=1, max_length=65536)
    grammar: str | None = Field(None, min_length=1, max_length=65536)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    deadline_s: float | None = Field(None, gt=0, le=86400)
    ttft_s: float | None = Field(None, gt=0, le=86400)
    tpot_s: float | None = Field(None, gt=0, le=86400)
    cache_salt: Label | None = None
    session_id: Name | None = None
    session_tool: Name | None = None
    speculate: SpeculateHow | None = None
    user: Label | None = None


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """What became of tokens guessed ahead."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ErrorDetail(BaseModel):
    """What went wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Body of every 4xx and 5xx reply."""

    error: ErrorDetail
    request_id: str


class TopLogprob(BaseModel):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """The chosen token with its alternatives."""

    top_logprobs: list[TopLogprob]
