"""The line of ``tpot_s`` a sequence should stay on, and how far behind it is.

What it needs is verified first (`coppice.speculation.select`), the rest where it yields most.

Source: Li et al., AdaServe (EuroSys 2026).
"""

from __future__ import annotations

from math import inf

from coppice.scheduling.interfaces import SequenceView


def next_token_due(sequence: SequenceView) -> float:
    """When the next token is due on the line of ``tpot_s`` after the first; inf without one."""
    if sequence.tpot_s is None or not sequence.first_token_s:
        return inf
    later = sequence.num_tokens - sequence.first_tokens
    return sequence.first_token_s + sequence.tpot_s * (later + 1)


def tokens_a_step(sequence: SequenceView) -> float:
    """Tokens a step has brought it on average: more than 1 where guesses came true."""
    made = sequence.num_tokens - sequence.num_prompt
    return made / (made - sequence.accepted) if made > sequence.accepted else 1.0


def tokens_needed(sequence: SequenceView, now: float, step_s: float) -> float:
    """Tokens the next step must bring for a sequence to be on its line when it ends.

    Below 0 where it is ahead, minus infinity where it has no wish.

    Args:
        sequence: one that decodes.
        now: seconds.
        step_s: expected seconds of the step.
    """
    if sequence.tpot_s is None or not sequence.first_token_s:
        return -inf
    return 1.0 + (now + step_s - next_token_due(sequence)) / sequence.tpot_s
