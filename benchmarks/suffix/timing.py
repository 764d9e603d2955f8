"""Seconds: one proposal at so many stored tokens, and taking tokens in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from benchmarks.suffix.ours import View
from benchmarks.suffix.traces import Trace
from coppice.kernels.suffix import BYTES_PER_TOKEN, make_index
from coppice.speculation import History, SuffixProposer

LIMIT = 16


def proposal_times(traces: Sequence[Trace], stored: int) -> dict[str, float]:
    """Microseconds of `SuffixProposer.propose` with ``stored`` tokens of history.

    The history is answers of all traces, repeated with other tokens where they do not reach:
    the index is as full as it says, and what is asked for is in it.
    """
    history = History(4 * stored * BYTES_PER_TOKEN)
    answers = [turn.answer for trace in traces for turn in trace.turns]
    repeat = 0
    while history.num_tokens < stored:
        for answer in answers:
            history.add("", [(token + 7 * repeat) % 4096 for token in answer])
        repeat += 1
    proposer = SuffixProposer(history)
    times: list[float] = []
    for number, turn in enumerate(turn for trace in traces for turn in trace.turns[::7]):
        view = View(number, list(turn.prompt[-2000:]))
        proposer.propose([view], [1])  # reads the prompt
        for at in range(0, len(turn.answer), 3):
            view.tokens += turn.answer[at : at + 3]
            began = time.perf_counter()
            proposer.propose([view], [LIMIT])
            times.append(time.perf_counter() - began)
        proposer.forget(number)
    ordered = sorted(times)
    return {
        "median_us": 1e6 * statistics.median(ordered),
        "p99_us": 1e6 * ordered[int(0.99 * len(ordered))],
        "stored": history.num_tokens,
        "bytes_per_token": history.size_bytes / history.num_tokens,
    }


def append_us(traces: Sequence[Trace]) -> float:
    """Microseconds a token to take a text in, growth of the index included."""
    tokens = [token for trace in traces for turn in trace.turns for token in turn.prompt][:500_000]
    index = make_index(1 << 19)
    began = time.perf_counter()
    for at in range(0, len(tokens), 100):
        index.extend(tokens[at : at + 100])
    return 1e6 * (time.perf_counter() - began) / len(tokens)
