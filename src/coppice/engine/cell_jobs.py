"""What goes in and out of a cell, the process in which templates render and grammars compile.

Frames are a length of 4 bytes and msgpack; a job's frame begins with the time of day. Values
a client sent cross as JSON text: they hold numbers and characters that msgpack cannot.
"""

from __future__ import annotations

import struct
from datetime import datetime, timedelta

import msgspec

from coppice.engine.request import Grammar
from coppice.engine.toolcalls import ToolPlan

HEAD_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
MEMORY_MIB = 256
"""What a cell may take beyond what it holds once it is set up."""
_CLOCK = struct.Struct("<d")
_EPOCH = datetime(1970, 1, 1)


class Templates(msgspec.Struct, frozen=True, tag=True):
    """Sets a cell up to render: the model's templates by name, and the tokens they may write."""

    templates: dict[str, str]
    special_tokens: dict[str, str]


class Grammars(msgspec.Struct, frozen=True, tag=True):
    """Sets a cell up for grammars: what they need of a tokenizer, and the template for tools.

    ``tokens`` are each token's bytes, empty for an unused id.
    """

    tokens: list[bytes]
    eos_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    template: str | None


class Render(msgspec.Struct, frozen=True, tag=True):
    """Make a conversation a prompt; answered by `Rendered`."""

    template: str
    conversation: str
    """JSON: messages, tools (or null), template options (or null)."""
    max_chars: int


class PlanTools(msgspec.Struct, frozen=True, tag=True):
    """Make tools a grammar; answered by `Planned`."""

    tools: str
    """JSON: the tools, and the tool choice (or null)."""
    parallel: bool


class Check(msgspec.Struct, frozen=True, tag=True):
    """Compile a grammar; answered by `Checked`."""

    grammar: Grammar


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The prompt's text."""

    text: str


class Planned(msgspec.Struct, frozen=True, tag=True):
    """How the answer may call tools."""

    plan: ToolPlan


class Checked(msgspec.Struct, frozen=True, tag=True):
    """Set up; or the grammar can be used."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The job's `CoppiceError`."""

    code: str
    message: str
    param: str | None


Setup = Templates | Grammars
Job = Render | PlanTools | Check
Answer = Rendered | Planned | Checked | Refused


class Reply(msgspec.Struct, frozen=True):
    """An answer, and whether the cell leaves after it because it has grown too much."""

    answer: Answer
    worn: bool = False


_encoder = msgspec.msgpack.Encoder()
_setups: msgspec.msgpack.Decoder[Setup] = msgspec.msgpack.Decoder(Setup)
_jobs: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Setup | Job | Reply) -> bytes:
    """A message without its frame."""
    return _encoder.encode(message)


def framed(body: bytes) -> bytes:
    """A body with its length in front."""
    return len(body).to_bytes(HEAD_BYTES, "little") + body


def timed(job: bytes, now: datetime) -> bytes:
    """An encoded job with the local time of day, which templates may ask for, in front."""
    return _CLOCK.pack((now - _EPOCH).total_seconds()) + job


def decode_setup(body: bytes) -> Setup:
    """Raises `msgspec.DecodeError` for anything else."""
    return _setups.decode(body)


def decode_job(body: bytes) -> tuple[datetime, Job]:
    """What `timed` made; raises `msgspec.DecodeError` for anything else."""
    (seconds,) = _CLOCK.unpack_from(body)
    return _EPOCH + timedelta(seconds=seconds), _jobs.decode(memoryview(body)[_CLOCK.size :])


def decode_reply(body: bytes) -> Reply:
    """Raises `msgspec.DecodeError` for anything else."""
    return _replies.decode(body)
