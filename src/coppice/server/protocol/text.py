"""``/tokenize``, ``/detokenize``."""

from __future__ import annotations

from pydantic import BaseModel, Field

from coppice.server.protocol.common import Fields, Label, TokenId

MAX_TOKENS = 1 << 20


class TokenizeRequest(Fields):
    """Body of ``POST /tokenize``."""

    model: Label | None = None
    prompt: str
    add_special_tokens: bool = True


class TokenizeReply(BaseModel):
    """Token ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int
    warnings: list[str] | None = None


class DetokenizeRequest(Fields):
    """Body of ``POST /detokenize``."""

    model: Label | None = None
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


class DetokenizeReply(BaseModel):
    """Text of token ids."""

    prompt: str
    warnings: list[str] | None = None
