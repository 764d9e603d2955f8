"""From logits to tokens: a sequence's sampling state, and one call per step.

The steps and their order are `coppice.kernels.sampling.STEPS`; the arithmetic is in
``kernels``. Here lives what changes as a sequence grows: token counts (only while a penalty
is on), the ban of ending tokens until ``min_tokens``, and the way back when a token tree's
branch is abandoned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from coppice.engine.faults import Fault
from coppice.engine.messages import TokenLogprob
from coppice.engine.noise import choice_seed
from coppice.engine.request import SamplingParams
from coppice.errors import RequestError, RowFaultError
from coppice.kernels.sampling import F32, I32, U8, Mask, RowParams, Workspace, choose

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM: dividing by them would overflow."""


class SamplerState:
    """Sampling state of one sequence (one choice of a request).

    Args:
        params: the request's sampling parameters, ``seed`` filled in (``None`` counts as 0).
        prompt: prompt token ids; read only when ``repetition_penalty`` is on.
        vocab_size: tokens at or above it are never chosen, though logits may have more.
        choice_index: which of the request's ``n`` choices.
        eos_ids: ending tokens of the model; part of the ``min_tokens`` ban unless
            ``ignore_eos``.
    """

    __slots__ = ("_argmax", "_counts", "_history", "_min_tokens", "num_output", "params", "row")

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        choice_index: int = 0,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.num_output = 0
        self._min_tokens = params.min_tokens
        self._history: list[int] = []
        self.row = _row_of(params, vocab_size, choice_index)
        ending = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
        self.row.banned_ids = np.array(sorted(t for t in ending if t >= 0), np.int32)
        self.row.num_banned = len(self.row.banned_ids) if self._min_tokens > 0 else 0
        self.row.publish()
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            seen = prompt if params.repetition_penalty != 1.0 else ()
            self._counts = TokenCounts(self.row, seen)
        self._argmax = (
            self.row.inv_temperature == 0.0
            and self._counts is None
            and not len(self.row.bias_ids)
            and not self.wants_logprobs
        )

    @property
    def is_argmax(self) -> bool:
        """Whether the largest of the model's own logits is all there is to the next choice."""
        return self._argmax and not self.row.num_banned

    @property
    def wants_logprobs(self) -> bool:
        """Whether `sample` reports logprobs for this sequence."""
        return self.row.num_top >= 0

    def accept(self, token: int) -> None:
        """Append a chosen token: it now counts for penalties and ``min_tokens``."""
        self.num_output += 1
        if self._counts is not None:
            self._history.append(token)
            self._counts.add(token, 1)
        if self.num_output == self._min_tokens:
            self.row.set_num_banned(0)

    def rollback(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` accepted tokens."""
        if not 0 <= num_tokens <= self.num_output:
            raise ValueError(f"cannot roll back {num_tokens} of {self.num_output} tokens")
        self.num_output -= num_tokens
        if self._counts is not None:
            for _ in range(num_tokens):
                self._counts.add(self._history.pop(), -1)
        if self.num_output < self._min_tokens:
            self.row.set_num_banned(len(self.row.banned_ids))

    def fork(self) -> SamplerState:
        """An independent copy with the same noise, for another branch of a token tree."""
        other = object.__new__(SamplerState)
        other.params = self.params
        other.num_output = self.num_output
        other._min_tokens = self._min_tokens
        other._argmax = self._argmax
        other._history = list(self._history)
        other.row = _copy_row(self.row)
        other._counts = None if self._counts is None else self._counts.copy_to(other.row)
        return other


class TokenCounts:
    """Which tokens a sequence holds and how often it output each, sparse, for penalties."""

    __slots__ = ("_index", "_row")

    def __init__(self, row: RowParams, prompt: Sequence[int]) -> None:
        ids = sorted(set(prompt))
        self._row = row
        self._index = {token: i for i, token in enumerate(ids)}
        capacity = len(ids) + 64
        columns = [np.zeros(capacity, np.int32) for _ in range(3)]
        columns[0][: len(ids)] = ids
        columns[2][: len(ids)] = 1
        row.set_seen(columns, len(ids))

    def add(self, token: int, amount: int) -> None:
        """Change a token's output count."""
        row, index = self._row, self._index.get(token)
        if index is None:
            index = row.num_seen
            if index == len(row.seen_ids):
                grown = [np.concatenate([c, np.zeros_like(c)]) for c in _columns(row)]
                row.set_seen(grown, index)
            self._index[token] = index
            row.seen_ids[index] = token
            row.set_num_seen(index + 1)
        row.seen_counts[index] += amount

    def copy_to(self, row: RowParams) -> TokenCounts:
        """The same counts, kept for ``row``."""
        other = object.__new__(TokenCounts)
        other._row, other._index = row, dict(self._index)
        row.set_seen([c.copy() for c in _columns(self._row)], self._row.num_seen)
        return other


@dataclass(slots=True)
class Sampled:
    """One step's choices for ``W`` rows.

    Attributes:
        tokens: ``[W]`` int32, -1 where the row failed.
        faults: ``[W]`` uint8; 0 is fine, else see `FAULTS`.
        logprobs: per row its logprobs, ``None`` for rows that did not ask or failed;
            ``None`` altogether when no row asked.
    """

    tokens: I32
    faults: U8
    logprobs: list[TokenLogprob | None] | None


FAULTS: dict[int, Fault] = {
    1: (
        RowFaultError.code,
        "The model produced a NaN or infinite logit; the weights or the prompt are damaged.",
    ),
    2: (
        RequestError.code,
        "No token is allowed here: the constraints of this request contradict each other.",
    ),
}
"""What to tell the client of a failed row, by fault code."""


def sample(
    logits: Tensor,
    states: Sequence[SamplerState],
    positions: Sequence[int],
    masks: Sequence[Mask | None] | None = None,
    *,
    workspace: Workspace | None = None,
) -> Sampled:
    """Choose one token for every row; nothing in ``states`` changes (see `accept`).

    Args:
        logits: ``[W, V]`` float32, contiguous, on any device; read only.
        states: each row's sequence.
        positions: absolute position of the token to be chosen (prompt tokens count).
        masks: each row's allowed tokens as an int32 bitmask, or ``None`` for all.
        workspace: arrays to work in and answer with; what they held before is gone.

    Returns:
        Tokens, fault codes, logprobs. A fault in one row leaves the others unchanged.
    """
    values: F32 = logits.detach().cpu().numpy()
    rows = [s.row for s in states]
    choices = choose(values, rows, positions, masks, workspace=workspace)
    logprobs: list[TokenLogprob | None] | None = None
    if choices.top_ids.shape[1]:
        logprobs = [None] * len(rows)
        for i, row in enumerate(rows):
            if row.num_top >= 0 and not choices.faults[i]:
                ids = choices.top_ids[i, : row.num_top].tolist()
                top = choices.top_logprobs[i, : row.num_top].tolist()
                pairs = [(t, p) for t, p in zip(ids, top, strict=True) if t >= 0]
                logprobs[i] = TokenLogprob(
                    int(choices.tokens[i]), float(choices.logprobs[i]), pairs
                )
    return Sampled(choices.tokens, choices.faults, logprobs)


def _row_of(params: SamplingParams, vocab_size: int, choice_index: int) -> RowParams:
    row = RowParams(vocab_size=vocab_size)
    row.seed = choice_seed(params.seed or 0, choice_index)
    if params.temperature >= GREEDY_BELOW:
        row.inv_temperature = 1.0 / params.temperature
    row.top_k = max(params.top_k, 0)
    row.top_p = params.top_p
    if params.min_p > 0.0:
        row.log_min_p = math.log(params.min_p)
    row.repetition = params.repetition_penalty
    row.presence, row.frequency = params.presence_penalty, params.frequency_penalty
    row.num_top = -1 if params.logprobs is None else params.logprobs
    bias = sorted((t, b) for t, b in params.logit_bias.items() if 0 <= t < vocab_size)
    row.bias_ids = np.array([t for t, _ in bias], np.int32)
    row.bias_values = np.array([b for _, b in bias], np.float32)
    return row


def _copy_row(row: RowParams) -> RowParams:
    other = RowParams(vocab_size=row.vocab_size)
    address, record = other.address, other._record
    other.__dict__.update(row.__dict__)
    other.address, other._record = address, record
    other.publish()
    return other


def _columns(row: RowParams) -> tuple[I32, I32, I32]:
    return row.seen_ids, row.seen_counts, row.seen_prompt
