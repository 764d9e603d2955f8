"""What a sequence's new tokens mean: does it end, what is reported, how it is counted."""

from __future__ import annotations

from collections.abc import Iterable

from coppice.engine.messages import FinishReason, Output
from coppice.engine.sequence import Sequence


def finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    """Whether the token just appended ends the sequence, and how."""
    if token in sequence.stop_ids:
        sequence.stop_token = token
        return "stop"
    if sequence.grammar is not None and sequence.grammar.is_stopped:
        return "stop"
    return "length" if len(sequence.tokens) >= sequence.end else None


def report(sequence: Sequence) -> Output:
    """What is new of a sequence since its last report, handed over."""
    request = sequence.request
    new = sequence.tokens[sequence.sent :]
    first = sequence.sent == len(request.prompt)
    ended = sequence.finish_reason is not None
    with_logprobs = request.sampling.logprobs is not None
    sequence.sent = len(sequence.tokens)
    if not (first or ended or with_logprobs):
        return Output(
            request_id=request.id,
            index=sequence.index,
            tokens=new,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
        )
    logprobs, sequence.logprobs = sequence.logprobs, []
    return Output(
        request_id=request.id,
        index=sequence.index,
        tokens=new,
        logprobs=logprobs if with_logprobs else None,
        finish_reason=sequence.finish_reason,
        stop_token=sequence.stop_token,
        cached_tokens=sequence.cached_tokens if first else 0,
        error=sequence.error,
        times=(sequence.submitted_s, sequence.scheduled_s, sequence.first_token_s)
        if first or ended
        else None,
        drafted=sequence.drafted,
        accepted=sequence.accepted,
    )


def outcome(sequences: Iterable[Sequence]) -> str:
    """One outcome for a request of several choices: the worst of theirs."""
    reasons = {s.finish_reason for s in sequences}
    for worst in ("failed", "expired", "cancelled"):
        if worst in reasons:
            return worst
    return "finished"
