"""What a client asks for: sampling parameters and the request itself.

Types here cross the process boundary as msgpack, so they hold plain values only.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from coppice.errors import RequestError

MAX_N = 16
MAX_STOP = 16
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20

SpeculateHow = Literal["off", "auto", "lookup", "suffix", "draft", "self"]
GrammarKind = Literal["json_schema", "json_object", "regex", "grammar", "tools"]


class Grammar(msgspec.Struct, frozen=True):
    """A constraint on the output text: ``kind`` and its source (JSON text, regex or Lark)."""

    kind: GrammarKind
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen; names and defaults as vLLM users know them.

    Raises:
        RequestError: a value is out of range; ``param`` names the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    """Tokens to generate; ``None`` means up to the context window."""
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 keeps the whole vocabulary."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    """``None``: drawn by the front end, so that a replay can repeat it."""
    logprobs: int | None = None
    """Top alternatives per token; 0 means the chosen token only, ``None`` means off."""
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be greater than 0.", param="top_p")
        _check_range("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_range("len(stop)", len(self.stop), 0, MAX_STOP)
        for text in self.stop:
            _check_range("len(stop[])", len(text.encode("utf-8", "replace")), 1, MAX_STOP_BYTES)
        _check_range("len(stop_token_ids)", len(self.stop_token_ids), 0, MAX_LOGIT_BIAS)
        _check_range("len(logit_bias)", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken and no noise is used."""
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise RequestError(
            f"{name} must lie between {low:g} and {high:g}, got {value!r}.",
            param=name.removeprefix("len(").split(")")[0].split("[")[0],
        )


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted request, tokenized.

    Attributes:
        id: unique while the request lives; chosen by the front end.
        prompt: token ids, at least one.
        sampling: with ``seed`` filled in.
        priority: lower runs first; 0 is normal.
        tenant: whose share the work counts against.
        cache_salt: scope of prefix sharing; requests share KV only within one salt.
        deadline_s: seconds from arrival after which the request expires with its partial
            output kept.
        wants_deadline: whether that was asked for, or is a bound of the server's.
        speculate: whether the engine, where it guesses ahead at all, may do so for this one,
            or the only way in which it may; its tokens are the same either way. With ``off``
            nothing of its answer is remembered for later guesses.
        key: name of the API key it came with, for metering.
        session: the agent's conversation it is a turn of, with its tenant; empty for none.
        session_tool: what is expected to run after this turn, as far as is known before.
        ttft_s: seconds from arrival within which the first token is wanted.
        tpot_s: seconds a later token is wanted in, on average.

    Raises:
        RequestError: a time is not positive.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    priority: int = 0
    tenant: str = "default"
    cache_salt: str = ""
    deadline_s: float | None = None
    speculate: SpeculateHow = "auto"
    key: str = ""
    session: str = ""
    session_tool: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    wants_deadline: bool = True

    def __post_init__(self) -> None:
        for name in ("deadline_s", "ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:  # also refuses NaN
                raise RequestError(
                    f"{name} must be more than 0 seconds from now, got {value!r}; a time in the "
                    "past cannot be met.",
                    param=name,
                )
