"""How far a sequence is behind its wish for time per token.

What it needs is verified first (`coppice.speculation.select`), the rest where it yields most.

Source: Li et al., AdaServe (EuroSys 2026).
"""

from __future__ import annotations

from math import inf

from coppice.scheduling.interfaces import SequenceView


def tokens_needed(sequence: SequenceView, now: float, step_s: float) -> float:
    """Tokens the next step must bring for a sequence to be on its line of ``tpot_s``.

    ``(time since the first token + the step) / tpot_s - tokens after the first``; below 0 where
    it is ahead, minus infinity where it has no wish.

    Args:
        sequence: one that decodes.
        now: seconds.
        step_s: expected seconds of the step, prompts and drafting included.
    """
    if sequence.tpot_s is None or not sequence.first_token_s:
        return -inf
    later = sequence.num_tokens - sequence.num_prompt - 1
    return (now - sequence.first_token_s + step_s) / sequence.tpot_s - later
