"""A cell: ``python -m coppice.engine.cell FD``, a process that may be killed at any moment.

Chat templates, tools, schemas and grammars are small programs by people we do not know. How
long they run and how much they take does not follow from their size, and a thread cannot be
stopped. Here they run one at a time under limits of the kernel, and whoever waits for an
answer ends the process when it takes too long.

It reads its setup from the Unix socket ``FD``, gets ready, gives away the right to more
memory, files and connections, says `Checked`, and answers jobs until the socket ends.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from coppice.engine.cell_jobs import (
    HEAD_BYTES,
    MAX_FRAME_BYTES,
    MEMORY_MIB,
    Answer,
    Check,
    Checked,
    Grammars,
    Job,
    Planned,
    PlanTools,
    Refused,
    Render,
    Rendered,
    Reply,
    Templates,
    decode_job,
    decode_setup,
    encode,
    framed,
)
from coppice.errors import CoppiceError, EngineError, GrammarError, RequestError

CPU_S = 5
"""Processor time after which the kernel ends a job, should whoever waits be gone."""
WORN_MIB = 64
"""Growth after which a cell leaves its place to a fresh one."""
_PAGE, _MIB = resource.getpagesize(), 1 << 20


def _open(path: str) -> int | None:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY)
    return None


class TemplateWork:
    """Renders the templates of one model; compiles them first of all."""

    def __init__(self, setup: Templates) -> None:
        from coppice.models.template import RenderLimits

        self._setup = setup
        self._now = datetime(1970, 1, 1)
        # One clock for all: compiled templates are remembered together with it.
        self._clock = lambda: self._now
        self._limits = RenderLimits
        hello = json.dumps(([{"role": "user", "content": "hello"}], None, None))
        for name in setup.templates:
            with suppress(RequestError):
                self.do(Render(name, hello, 1 << 20), self._now)

    def do(self, job: Job, now: datetime) -> Answer:
        """Render a conversation."""
        from coppice.models.template import prepare_messages, render_chat

        assert isinstance(job, Render)
        self._now = now
        template = self._setup.templates[job.template]
        messages, tools, options = json.loads(job.conversation)
        text = render_chat(
            template,
            prepare_messages(template, messages),
            tools=tools,
            special_tokens=self._setup.special_tokens,
            options=options,
            max_chars=job.max_chars,
            limits=self._limits(now=self._clock),
        )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("The text holds lone surrogates; send valid Unicode.") from None
        return Rendered(text)


class GrammarWork:
    """Plans tools and compiles grammars for one tokenizer."""

    def __init__(self, setup: Grammars) -> None:
        from coppice.engine import toolcalls
        from coppice.engine.grammar import GrammarCompiler
        from coppice.engine.request import Grammar

        self._setup = setup
        self._plan = toolcalls.plan_tools
        self._compiler = GrammarCompiler(_Vocabulary(setup)) if setup.eos_ids else None
        if self._compiler is not None:
            self._compiler.check(Grammar("json_object", ""))

    def do(self, job: Job, now: datetime) -> Answer:
        """Make tools a grammar, or try one."""
        del now
        if isinstance(job, PlanTools):
            tools, choice = json.loads(job.tools)
            template = self._setup.template
            return Planned(self._plan(tools, choice, parallel=job.parallel, template=template))
        assert isinstance(job, Check)
        if self._compiler is None:
            raise GrammarError("The model's tokenizer has no ending token; send no grammar.")
        self._compiler.check(job.grammar)
        return Checked()


class _Vocabulary:
    """A vocabulary as `GrammarTokenizer` wants it; splits text greedily.

    A grammar allows the same texts however they are split, which is all a check looks at.
    """

    def __init__(self, setup: Grammars) -> None:
        self._tokens = setup.tokens
        self._ids = {token: id_ for id_, token in enumerate(setup.tokens) if token}
        self._longest = max(map(len, setup.tokens), default=1)
        self.vocab_size = len(setup.tokens)
        self.eos_ids = setup.eos_ids
        self.special_ids: Iterable[int] = setup.special_ids

    def token_bytes(self, token: int) -> bytes:
        """Exact bytes of a token."""
        return self._tokens[token]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The longest token at each place; nothing where a byte has none."""
        del add_special_tokens
        data, made, start = text.encode(), [], 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token = self._ids.get(data[start:end])
                if token is not None:
                    made.append(token)
                    start = end
                    break
            else:
                return []
        return made


def confine(memory_bytes: int) -> None:
    """Give away, for good, what no job needs: more memory than this, files, connections."""
    used = _status_bytes("VmData")
    if used is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (used + memory_bytes,) * 2)
    # NOTE: from here on nothing can be imported that was not imported before.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _status_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux: no limit that could be counted
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def resident_bytes(statm: int | None = _open("/proc/self/statm")) -> int:
    """Memory held now; 0 where the system does not say."""
    return 0 if statm is None else int(os.pread(statm, 128, 0).split()[1]) * _PAGE


def answer(work: TemplateWork | GrammarWork, job: Job, now: datetime) -> Answer:
    """What comes of a job; its faults are its own."""
    try:
        return work.do(job, now)
    except CoppiceError as error:
        return Refused(error.code, error.message, error.param)
    except MemoryError:
        return Refused("", f"It takes more than {MEMORY_MIB} MiB of memory.", None)


def serve(stream: BinaryIO, connection: socket.socket) -> None:
    """Set up, then answer jobs until the stream ends."""
    setup = decode_setup(_frame(stream))
    work = TemplateWork(setup) if isinstance(setup, Templates) else GrammarWork(setup)
    worn_bytes = resident_bytes() + WORN_MIB * _MIB
    confine(MEMORY_MIB * _MIB)
    connection.sendall(framed(encode(Reply(Checked()))))
    while body := _frame(stream):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        most_s = int(usage.ru_utime + usage.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (most_s, resource.RLIM_INFINITY))
        now, job = decode_job(body)
        reply = answer(work, job, now)
        worn = resident_bytes() > worn_bytes
        connection.sendall(framed(encode(Reply(reply, worn))))


def _frame(stream: BinaryIO) -> bytes:
    """The next frame's body; empty at the end of the stream."""
    size = int.from_bytes(stream.read(HEAD_BYTES), "little")
    if size > MAX_FRAME_BYTES:
        raise EngineError(f"A job of {size} bytes cannot be.")
    body = stream.read(size)
    return body if len(body) == size else b""


def main() -> None:
    """Serve the socket whose number is the only argument."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # before anybody else
    with suppress(BrokenPipeError, ConnectionResetError), connection.makefile("rb") as stream:
        serve(stream, connection)


if __name__ == "__main__":
    main()
    os._exit(0)
