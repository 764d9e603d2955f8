"""The line a sequence must stay on."""

from __future__ import annotations

from math import inf

import pytest

from coppice.scheduling.slo import tokens_needed
from coppice.scheduling.virtual import VirtualSequence


def test_what_a_sequence_needs() -> None:
    s = VirtualSequence(arrival=0, num_prompt=5, num_answer=9, submitted_s=0.0, tpot_s=0.1)
    assert tokens_needed(s, 1.0, 0.1) == -inf, "its first token has another wish"
    s.first_token_s, s.num_tokens = 1.0, 5 + 3
    assert tokens_needed(s, 1.4, 0.1) == pytest.approx(3.0)
    assert tokens_needed(s, 1.0, 0.1) == pytest.approx(-1.0)
    s.tpot_s = None
    assert tokens_needed(s, 1.0, 0.1) == -inf
