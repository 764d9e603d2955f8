"""Messages between the front end and the engine, msgpack on the wire.

Front end to engine: `Submit`, `Cancel`, `Park`, `ToolCalled`, `EndSession`, `Shutdown`. Engine to
front end: `Ready`, `Output`, `StepStats`, `Fatal`. Frames are a 4-byte little-endian length and a
tagged msgpack body (`encode`, `Decoder`).
"""

from __future__ import annotations

import signal
from typing import Literal

import msgspec

from coppice.engine.request import Request

FinishReason = Literal["stop", "length", "cancelled", "expired", "failed"]
CancelReason = Literal["cancelled", "expired", "stop"]
STACKS_SIGNAL = signal.SIGUSR1
"""A loaded engine answers it by writing the stacks of its threads to stderr."""


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """What one choice was given before the engine process began anew.

    Attributes:
        index: which of the request's ``n`` choices.
        tokens: those accepted so far, none of which ended it.
        drafted: tokens guessed ahead for it so far, and ``accepted`` of them.
    """

    index: int
    tokens: list[int] = []
    drafted: int = 0
    accepted: int = 0


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start this request, or go on with it where another engine process left it.

    ``progress`` has the choices that are still open, in order; empty: all, from the start.
    """

    request: Request
    progress: list[Progress] = []


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request now. ``stop`` means the front end met a stop string: a normal end.

    ``index`` ends one choice only; ``None`` ends the whole request.
    """

    request_id: str
    reason: CancelReason = "cancelled"
    index: int | None = None


class Park(msgspec.Struct, frozen=True, tag=True):
    """The reader does not keep up: hold the request without pages until ``on`` is false."""

    request_id: str
    on: bool


class ToolCalled(msgspec.Struct, frozen=True, tag=True):
    """The last answer in a session called this tool: the session is back when that has run."""

    session: str
    tool: str


class EndSession(msgspec.Struct, frozen=True, tag=True):
    """Nobody will go on with a session; unknown ones and those that have ended are no fault."""

    session: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the step loop after the current step."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The chosen token's log-probability and the top alternatives ``(token, logprob)``."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Output(msgspec.Struct, frozen=True, tag=True, kw_only=True, gc=False):
    """New tokens of one choice of one request, and its end if it ended.

    Attributes:
        index: which of the request's ``n`` choices.
        tokens: newly accepted tokens, in order; may be empty in the last message. An EOS or
            stop token that ended the sequence is the last one (``stop_token`` repeats it).
        logprobs: one entry per token, or ``None`` when not asked for.
        finish_reason: set in the last message of the choice, else ``None``.
        stop_token: the EOS or stop token id that ended it, if one did.
        cached_tokens: prompt tokens taken from the prefix cache (first message of a choice).
        error: ``(code, message)`` when ``finish_reason`` is ``failed``.
        times: monotonic seconds (engine clock) of arrival, first scheduling and first token,
            in the first and the last message of the choice.
        drafted: tokens guessed ahead for the choice so far, and ``accepted`` of them.
    """

    request_id: str
    index: int = 0
    tokens: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    error: tuple[str, str] | None = None
    times: tuple[float, float, float] | None = None
    drafted: int = 0
    accepted: int = 0


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end must know about the loaded model."""

    name: str
    architecture: str
    context_length: int
    vocab_size: int
    num_params: int
    weight_bytes: int
    weight_format: str
    fingerprint: str
    """Changes with weights, precision and kernels; ``system_fingerprint`` in replies."""
    page_size: int
    num_pages: int
    kv_format: str = ""
    """Type of the KV pages, for example ``"bfloat16"`` or ``"int8"``."""
    kernels: str
    num_threads: int
    knows_sessions: bool = False
    """Whether anything depends on a request's session."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and the loop runs."""

    facts: ModelFacts


class Usage(msgspec.Struct, kw_only=True):
    """Totals of one tenant and key since the engine started.

    Attributes:
        prompt_tokens: of prompts, at the first token; ``cached_tokens`` of them were kept ones.
        computed_tokens: rows computed, recomputed ones included.
        recomputed_tokens: rows computed again after a preemption or a pause.
        generated_tokens: accepted answer tokens; ``drafted_tokens`` were verified for them and
            ``accepted_tokens`` of these were right.
        page_s: KV pages held times seconds.
        step_s: its part of the time of the steps.
        sequences: ended ones.
        deadlines_met: of those that had a wish (``deadline_s``, ``ttft_s``, ``tpot_s``) and were
            not cancelled, how many had all of it; ``deadlines_missed`` are the others.
    """

    tenant: str
    key: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    page_s: float = 0.0
    step_s: float = 0.0
    sequences: int = 0
    deadlines_met: int = 0
    deadlines_missed: int = 0


class StepTree(msgspec.Struct, frozen=True, kw_only=True):
    """The token tree one step verified: its shape only, no text, since everybody may see it.

    Attributes:
        source: who proposed it.
        parents: number of each node's parent, -1 for the root.
        accepted: the nodes kept, along one path.
    """

    source: str
    parents: list[int]
    accepted: list[int]


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one tier behind the KV cache holds and did, in pages.

    Attributes:
        tier: ``ram`` or ``disk``.
        state: ``on``, or ``off`` after a fault, which ``why`` names.
        hits: brought back instead of computed; ``misses`` were looked for in vain.
        written: to disk; ``dropped`` found the queue full, ``damaged`` were not the same.
    """

    tier: str
    state: str = "on"
    why: str = ""
    pages: int = 0
    size_bytes: int = 0
    hits: int = 0
    misses: int = 0
    written: int = 0
    dropped: int = 0
    damaged: int = 0


class SessionStats(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions of agents.

    Attributes:
        open: between their first and last turn; ``paused`` of them have no turn running.
        waiting: first turns the window holds back.
        given_up: in all, for not coming back in time.
        kept_pages: KV pages to be evicted last, for the paused; ``revoked_pages`` had to go, in
            all, before their session came back.
    """

    open: int = 0
    paused: int = 0
    waiting: int = 0
    given_up: int = 0
    kept_pages: int = 0
    revoked_pages: int = 0


class StepStats(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Gauges and running totals, sent a few times a second while there is work."""

    running: int
    waiting: int
    waiting_tokens: int
    pages_used: int
    pages_cached: int
    num_pages: int
    steps: int
    rows: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    model_s: float
    other_s: float
    prefill_rate_tok_s: float
    outcomes: dict[str, int]
    usage: list[Usage] = []
    short_of_memory: bool = False
    waiting_for: str = ""
    """Why the first in turn was not admitted by the last plan, in words; empty for nobody."""
    drafts: int = 0
    """Token trees verified; ``drafted`` counts their nodes, ``accepted`` those kept."""
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = []
    """Trees whose path was kept at least to this depth, by depth."""
    draft_s: float = 0.0
    speculation_faults: int = 0
    history_bytes: int = 0
    """Memory of earlier answers and of the requests' own indexes."""
    history_evicted: int = 0
    tiers: list[TierStats] = []
    sessions: SessionStats = SessionStats()
    tree: StepTree | None = None
    """The largest token tree of the last step that had one."""


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on; it exits after this message."""

    code: str
    message: str


ToEngine = Submit | Cancel | Park | ToolCalled | EndSession | Shutdown
FromEngine = Ready | Output | StepStats | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """A length-prefixed frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def decode_to_engine(body: bytes) -> ToEngine:
    """Parse one frame body sent to the engine."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """Parse one frame body sent by the engine."""
    return _from_engine.decode(body)
