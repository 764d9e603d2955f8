"""The line a sequence must stay on."""

from __future__ import annotations

from math import inf

import pytest

from coppice.scheduling.slo import next_token_due, tokens_needed
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
