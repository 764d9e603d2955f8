"""The line a sequence must stay on."""

from __future__ import annotations

from math import inf

import pytest

from coppice.scheduling import FlowQueues, Policy, Snapshot, rows_of_guesses
from coppice.scheduling.budget import rows_in_time
from coppice.scheduling.slo import next_token_due, tokens_a_step, tokens_needed
from coppice.scheduling.virtual import VirtualSequence


def test_what_a_sequence_needs() -> None:
    s = VirtualSequence(arrival=0, num_prompt=5, num_answer=9, submitted_s=0.0, tpot_s=0.1)
    assert tokens_needed(s, 1.0, 0.1) == -inf, "its first token has another wish"
    s.first_token_s, s.first_tokens, s.num_tokens = 1.0, 5 + 1, 5 + 3
    assert tokens_needed(s, 1.4, 0.1) == pytest.approx(3.0)
    assert tokens_needed(s, 1.0, 0.1) == pytest.approx(-1.0)
    s.tpot_s = None
    assert tokens_needed(s, 1.0, 0.1) == -inf


def test_tokens_of_a_life_before_do_not_count_as_early() -> None:
    s = VirtualSequence(arrival=0, num_prompt=5, num_answer=900, submitted_s=0.0, tpot_s=0.1)
    s.first_token_s, s.first_tokens, s.num_tokens = 1.0, 5 + 500, 5 + 500
    assert next_token_due(s) == pytest.approx(1.1)
    assert tokens_needed(s, 1.2, 0.1) == pytest.approx(3.0)


class RowsOfAMillisecond:
    """A step takes a millisecond a row."""

    def time(self, num_rows: int) -> float:
        return num_rows * 1e-3

    def rows_within(self, seconds: float, most: int) -> int:
        return max(1, min(most, int(seconds * 1e3 + 1e-9)))


def test_who_gets_several_tokens_from_a_step_can_wait_longer_for_it() -> None:
    s = VirtualSequence(
        arrival=0, num_prompt=5, num_answer=900, submitted_s=0.0, tpot_s=0.1, num_tokens=11,
        first_token_s=1.0, first_tokens=6,
    )  # fmt: skip
    snapshot = Snapshot(
        running=[s], waiting=FlowQueues(Policy().flows), now=1.5, num_available=9, page_size=4,
        max_rows=512, max_sequences=8, prefill_chunk=256,
    )  # fmt: skip
    assert rows_in_time(snapshot, RowsOfAMillisecond(), 0.0) == 100, "the next one is due at 1.6"
    s.accepted = 4  # six tokens in two steps
    assert tokens_a_step(s) == 3.0
    assert rows_of_guesses([s]) == 3
    assert rows_in_time(snapshot, RowsOfAMillisecond(), 0.0) == 300 - 3
