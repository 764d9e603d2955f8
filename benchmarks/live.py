"""A trace through the real engine, in this process and in real time, recorded like a simulation."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.workloads.azure import text_tokens
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel
from coppice.engine.request import Request, SamplingParams
from coppice.scheduling import Policy
from coppice.scheduling.record import Answer, Moment, Record
from coppice.scheduling.virtual import Sizes, VirtualSequence


def replay(
    model: EngineModel,
    config: EngineConfig,
    sequences: Sequence[VirtualSequence],
    *,
    policy: Policy | None = None,
    seed: int = 1,
) -> Record:
    """Submit each request when it is due; answers have the trace's lengths."""
    engine = Engine(model, config, policy=policy)
    warm_up(engine, model.facts.vocab_size)
    vocab = model.facts.vocab_size
    requests = {
        f"r{s.arrival}": (
            s,
            as_request(s, vocab, seed),
        )
        for s in sequences
    }
    pending = list(requests.values())
    record = Record(last_arrival_s=max(s.submitted_s for s in sequences))
    accounts = record.accounts
    first: dict[str, float] = {}
    counts: dict[str, int] = {}
    at, began = 0, time.monotonic()
    steps_before = engine.stats().steps
    while at < len(pending) or engine.has_work:
        now = time.monotonic() - began
        while at < len(pending) and pending[at][0].submitted_s <= now:
            s, request = pending[at]
            accounts.ask(s.tenant, s.submitted_s, s.num_prompt, s.num_answer)
            engine.submit(request)
            at += 1
        if not engine.has_work:
            time.sleep(max(0.0, pending[at][0].submitted_s - now))
            continue
        outputs = engine.step()
        now = time.monotonic() - began
        for output in outputs:
            s, request = requests[output.request_id]
            if output.tokens:
                if output.request_id not in first:
                    first[output.request_id] = now
                    accounts.read(s.tenant, now, s.num_prompt)
                counts[output.request_id] = counts.get(output.request_id, 0) + len(output.tokens)
                accounts.wrote(s.tenant, now, len(output.tokens))
            if output.finish_reason is not None:
                record.answers.append(
                    Answer(
                        s.tenant,
                        s.submitted_s,
                        first.get(output.request_id, 0.0),
                        now,
                        s.num_prompt,
                        counts.get(output.request_id, 0),
                        output.finish_reason == "length",
                        s.tpot_s,
                    )
                )
        stats = engine.stats() if engine.has_work else None
        if stats is not None:
            record.moments.append(Moment(now, stats.waiting, stats.running, stats.pages_used))
    record.seconds = time.monotonic() - began
    record.preemptions = engine.stats().preemptions
    record.steps = engine.stats().steps - steps_before
    return record


def as_request(s: VirtualSequence, vocab_size: int, seed: int) -> Request:
    """A request of these lengths and wishes that shares no prefix with another."""
    return Request(
        id=f"r{s.arrival}",
        prompt=text_tokens(s.num_prompt, vocab_size, seed + s.arrival),
        sampling=SamplingParams(
            max_tokens=s.num_answer, temperature=0.0, ignore_eos=True, seed=s.arrival
        ),
        tenant=s.tenant,
        priority=s.priority,
        ttft_s=s.ttft_s,
        tpot_s=s.tpot_s,
        cache_salt=f"{s.arrival}",
    )


def warm_up(engine: Engine, vocab_size: int) -> None:
    """One small batch, so that the first measured step is like the others."""
    for i in range(8):
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, seed=0)
        prompt = text_tokens(64, vocab_size, i)
        engine.submit(Request(id=f"warm{i}", prompt=prompt, sampling=params, cache_salt="warm"))
    while engine.has_work:
        engine.step()


def sizes_of(engine_pages: int, config: EngineConfig) -> Sizes:
    """The same sizes for a virtual engine."""
    return Sizes(
        num_pages=engine_pages,
        page_size=config.page_size,
        max_rows=config.max_rows,
        max_sequences=config.max_sequences,
        prefill_chunk=config.prefill_chunk,
        prefix_cache=False,
    )
