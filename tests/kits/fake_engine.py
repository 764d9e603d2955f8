"""A scripted stand-in for the engine process, for tests of the front end alone.

It answers every request with its own prompt, again and again, up to ``max_tokens``; after the
first time round it says EOS unless ``ignore_eos``. Each extra choice starts one token later.
Seeds do things: 666 fails the request, 667 kills the process, 669 does so at the tenth token,
668 never answers, at 670 the first engine to see it stands still. Of three tokens it claims to
have guessed ahead two, and one rightly, unless told not to.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field

from coppice.engine.messages import (
    STACKS_SIGNAL,
    Cancel,
    Fatal,
    ModelFacts,
    Output,
    Progress,
    Ready,
    Shutdown,
    StepStats,
    Submit,
    TokenLogprob,
    Usage,
    decode_to_engine,
    encode,
)
from coppice.engine.request import Request

FAIL, DIE, HANG, DIE_AT_TEN, STALL = 666, 667, 668, 669, 670
PAGE_SIZE, NUM_PAGES = 16, 1024


@dataclass
class Sequence:
    request: Request
    index: int
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    tokens: int = 0

    @property
    def pages(self) -> int:
        return math.ceil((len(self.request.prompt) + self.tokens) / PAGE_SIZE)

    @property
    def drafted(self) -> int:
        return 0 if self.request.speculate == "off" else 2 * self.accepted

    @property
    def accepted(self) -> int:
        return 0 if self.request.speculate == "off" else self.tokens // 3


class FakeEngine:
    def __init__(self, connection: socket.socket, options: dict[str, object]) -> None:
        self.connection = connection
        self.step_s = float(options.get("step_s", 0.001))
        self.eos = int(options["eos"])
        self.vocab_size = int(options["vocab_size"])
        self.context = int(options.get("context_length", 2048))
        self.live: list[Sequence] = []
        self.usage: dict[str, Usage] = {}
        self.generated = self.steps = self.prompt_tokens = self.drafted = self.accepted = 0
        self.buffer = b""
        self.replayed = False
        self.fingerprint = f"fp_{os.getpid()}" if options.get("new_weights") else "fp_fake"

    def run(self) -> None:
        self.send(Ready(self.facts()))
        while True:
            if not self.read(0 if self.live else 0.2):
                return
            self.step()
            self.send(self.stats())
            if self.live:
                time.sleep(self.step_s)

    def read(self, wait_s: float) -> bool:
        while select.select([self.connection], [], [], wait_s)[0]:
            data = self.connection.recv(1 << 20)
            if not data:
                return False
            self.buffer += data
            wait_s = 0
            while len(self.buffer) >= 4:
                size = int.from_bytes(self.buffer[:4], "little")
                if len(self.buffer) < 4 + size:
                    break
                body, self.buffer = self.buffer[4 : 4 + size], self.buffer[4 + size :]
                match decode_to_engine(body):
                    case Submit(request, progress):
                        self.submit(request, progress)
                    case Cancel(request_id, reason, index):
                        self.cancel(request_id, reason, index)
                    case Shutdown():
                        return False
        return True

    def submit(self, request: Request, progress: list[Progress]) -> None:
        assert request.sampling.seed is not None
        assert request.sampling.max_tokens is not None
        if request.sampling.seed == DIE:
            os._exit(9)
        self.replayed |= bool(progress)
        self.prompt_tokens += len(request.prompt)
        used = self.usage.setdefault(request.tenant, Usage(tenant=request.tenant, key=request.key))
        used.prompt_tokens += len(request.prompt)
        self.live += [
            Sequence(request, index=p.index, tokens=len(p.tokens))
            for p in progress or map(Progress, range(request.sampling.n))
        ]

    def cancel(self, request_id: str, reason: str, index: int | None) -> None:
        for sequence in list(self.live):
            same = sequence.request.id == request_id and index in (None, sequence.index)
            if same:
                self.end(sequence, reason)

    def end(self, sequence: Sequence, reason: str, **fields: object) -> None:
        self.live.remove(sequence)
        self.drafted += sequence.drafted
        self.accepted += sequence.accepted
        now = time.monotonic()
        self.send(
            Output(
                request_id=sequence.request.id,
                index=sequence.index,
                finish_reason=reason,
                times=(sequence.arrived, sequence.arrived, sequence.first or now),
                drafted=sequence.drafted,
                accepted=sequence.accepted,
                **fields,
            )
        )

    def step(self) -> None:
        self.steps += bool(self.live)
        for sequence in list(self.live):
            self.advance(sequence)

    def advance(self, sequence: Sequence) -> None:
        request, params = sequence.request, sequence.request.sampling
        if params.seed == HANG:
            return
        if params.seed == STALL and sequence.tokens == 5 and not self.replayed:
            stand_still_in_a_step()
        if params.seed == FAIL and sequence.tokens >= 2:
            self.end(sequence, "failed", error=("row_fault", "A row of this request failed."))
            return
        if params.seed == DIE_AT_TEN and sequence.tokens >= 10:
            os._exit(9)
        age = time.monotonic() - sequence.arrived
        if request.deadline_s is not None and age > request.deadline_s:
            self.end(sequence, "expired")
            return
        position = sequence.index + sequence.tokens
        at_end = sequence.tokens == len(request.prompt) - sequence.index
        ends = at_end and not params.ignore_eos and sequence.tokens >= params.min_tokens
        token = self.eos if ends else request.prompt[position % len(request.prompt)]
        if sequence.first is None:
            sequence.first = time.monotonic()
        sequence.tokens += 1
        self.generated += 1
        logprobs = None
        if params.logprobs is not None:
            top = [((token + i) % self.vocab_size, -0.5 - i) for i in range(params.logprobs)]
            if top:
                top[-1] = (top[-1][0], -math.inf)
            logprobs = [TokenLogprob(token, -0.5, top)]
        stops = ends or token in params.stop_token_ids
        fields = {"tokens": [token], "logprobs": logprobs}
        if stops:
            self.end(sequence, "stop", stop_token=token, **fields)
        elif sequence.tokens >= params.max_tokens:
            self.end(sequence, "length", **fields)
        else:
            fields |= {"drafted": sequence.drafted, "accepted": sequence.accepted}
            self.send(Output(request_id=request.id, index=sequence.index, **fields))

    def send(self, message: object) -> None:
        self.connection.sendall(encode(message))

    def facts(self) -> ModelFacts:
        return ModelFacts(
            name="fake", architecture="fake", context_length=self.context,
            vocab_size=self.vocab_size, num_params=0, weight_bytes=0, weight_format="none",
            fingerprint=self.fingerprint, page_size=PAGE_SIZE, num_pages=NUM_PAGES, kernels="none",
            num_threads=1,
        )  # fmt: skip

    def stats(self) -> StepStats:
        pages = sum(sequence.pages for sequence in self.live)
        return StepStats(
            running=len(self.live), waiting=0, waiting_tokens=0, pages_used=pages, pages_cached=0,
            num_pages=NUM_PAGES, steps=self.steps, rows=self.generated,
            prompt_tokens=self.prompt_tokens, generated_tokens=self.generated,
            prefix_queried_tokens=0, prefix_hit_tokens=0, preemptions=0,
            drafted=self.drafted, accepted=self.accepted, model_s=0.0, other_s=0.0,
            prefill_rate_tok_s=0.0, outcomes={},
            usage=list(self.usage.values()),
        )  # fmt: skip


def stand_still_in_a_step() -> None:
    time.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--options", required=True)
    args = parser.parse_args()
    options = json.loads(args.options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(args.socket)
    if "fatal" in options:
        connection.sendall(encode(Fatal("checkpoint_error", str(options["fatal"]))))
        raise SystemExit(2)
    time.sleep(float(options.get("load_s", 0.0)))
    FakeEngine(connection, options).run()


if __name__ == "__main__":
    main()
