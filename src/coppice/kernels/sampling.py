"""Choosing tokens from logits: the parameters of a row, and which implementation runs.

Two implementations exist, equal bit for bit: `coppice.kernels.sampling_reference` (numpy)
and ``native/sampler.cpp`` (the extension). Both do, for every row, the steps of `STEPS` in
that order. A row is a function of its own logits, parameters, position and mask alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coppice.errors import ConfigError

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Mask = NDArray[np.int32]
"""``[ceil(V / 32)]`` int32; bit ``t % 32`` of word ``t // 32`` allows token ``t``."""

STEPS = (
    "raw_logprobs",
    "logit_bias",
    "penalties",
    "min_tokens",
    "grammar_mask",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "noise",
    "argmax",
)
"""What happens to a row, in order.

``raw_logprobs`` is the log-softmax of the model's own logits, before anything below.
``logit_bias`` adds; ``penalties`` are vLLM's (repetition divides positive and multiplies
negative logits of tokens in prompt or output; frequency and presence subtract for output
tokens); ``min_tokens`` bans the ending tokens until enough were chosen, unless the grammar
allows nothing else; ``temperature`` makes ``y = (x - max x) / T``; ``top_k``, then ``top_p``
of what top_k kept, then ``min_p`` (``y >= ln min_p``) cut the order (y descending, token id
ascending), so ties at a boundary fall to the lower id. Every cut keeps at least one token.
``argmax`` of ``y + noise`` over what is kept, lowest id on a tie. With temperature 0 the
steps after ``grammar_mask`` are one argmax.
"""

OK, NOT_FINITE, NOTHING_ALLOWED = 0, 1, 2
"""Fault codes: fine; a NaN or +inf logit; every token banned."""

MAX_TOP = 20

ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("top_p", np.float64),
        ("bias_ids", np.uint64),
        ("bias_values", np.uint64),
        ("banned_ids", np.uint64),
        ("seen_ids", np.uint64),
        ("seen_counts", np.uint64),
        ("seen_prompt", np.uint64),
        ("inv_temperature", np.float32),
        ("log_min_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("top_k", np.int32),
        ("vocab_size", np.int32),
        ("num_top", np.int32),
        ("num_bias", np.int32),
        ("num_banned", np.int32),
        ("num_seen", np.int32),
        ("reserved", np.int32),
    ],
    align=True,
)
"""A row's parameters as the native sampler reads them (``struct Row`` there)."""

_ARRAYS = ("bias_ids", "bias_values", "banned_ids", "seen_ids", "seen_counts", "seen_prompt")
_SCALARS = tuple(
    name for name in ROW.names or () if name not in (*_ARRAYS, "seed", "num_bias", "reserved")
)


class RowParams:
    """Sampling parameters of one sequence in the form kernels read; made once, then reused.

    Attributes:
        seed: 64-bit noise key.
        inv_temperature: ``1 / temperature``; 0 means greedy.
        top_k: tokens to keep, 0 for all.
        top_p: probability mass to keep, 1 for all.
        log_min_p: ``ln min_p``, ``-inf`` when off.
        repetition, presence, frequency: penalties; 1, 0, 0 are off.
        vocab_size: tokens at or above it are never chosen (padded vocabularies).
        num_top: top alternatives to report, -1 when no logprobs are wanted.
        bias_ids, bias_values: ``[B]`` int32 and float32.
        banned_ids: ``[E]`` int32, banned while ``num_banned`` says so.
        seen_ids, seen_counts, seen_prompt: ``[capacity]`` int32, the first ``num_seen``
            valid: a token, how often it was output, whether the prompt has it.
    """

    def __init__(self, *, vocab_size: int) -> None:
        self.seed = 0
        self.inv_temperature = 0.0
        self.top_k = 0
        self.top_p = 1.0
        self.log_min_p = -np.inf
        self.repetition = 1.0
        self.presence = 0.0
        self.frequency = 0.0
        self.vocab_size = vocab_size
        self.num_top = -1
        empty = np.zeros(0, np.int32)
        self.bias_ids: I32 = empty
        self.bias_values: F32 = np.zeros(0, np.float32)
        self.banned_ids: I32 = empty
        self.seen_ids: I32 = empty
        self.seen_counts: I32 = empty
        self.seen_prompt: I32 = empty
        self.num_banned = 0
        self.num_seen = 0
        self._record: NDArray[np.void] = np.zeros(1, ROW)
        self.address = _address(self._record)

    def publish(self) -> None:
        """Write everything into the record that `address` points to."""
        record = self._record[0]
        record["seed"] = np.uint64(self.seed)
        for name in _SCALARS:
            record[name] = getattr(self, name)
        record["num_bias"] = len(self.bias_ids)
        for name in _ARRAYS:
            record[name] = _address(getattr(self, name))

    def set_num_banned(self, num_banned: int) -> None:
        """Switch the ban of ending tokens on or off."""
        self.num_banned = num_banned
        self._record["num_banned"] = num_banned

    def set_seen(self, columns: Sequence[I32], num_seen: int) -> None:
        """Point at (possibly regrown) token counts: ids, counts, prompt flags."""
        ids, counts, prompt = columns
        self.seen_ids, self.seen_counts, self.seen_prompt = ids, counts, prompt
        self.num_seen = num_seen
        record = self._record[0]
        record["seen_ids"], record["seen_counts"] = _address(ids), _address(counts)
        record["seen_prompt"], record["num_seen"] = _address(prompt), num_seen

    def set_num_seen(self, num_seen: int) -> None:
        """Say how many entries of the counts are valid."""
        self.num_seen = num_seen
        self._record["num_seen"] = num_seen


@dataclass(slots=True)
class Choices:
    """What was chosen for ``W`` rows.

    Attributes:
        tokens: ``[W]`` int32, -1 where a row failed.
        faults: ``[W]`` uint8, one of `OK`, `NOT_FINITE`, `NOTHING_ALLOWED`.
        logprobs: ``[W]`` float64 of the chosen tokens, 0 in rows that did not ask.
        top_ids: ``[W, MAX_TOP]`` int32; ``top_logprobs``: same shape, float64. Ordered by
            logprob descending, token id ascending; -1 beyond a row's ``num_top``.
    """

    tokens: I32
    faults: U8
    logprobs: F64
    top_ids: I32
    top_logprobs: F64

    def fail(self) -> None:
        """Make every row one that failed."""
        self.tokens.fill(-1)
        self.faults.fill(0)
        self.logprobs.fill(0.0)
        self.top_ids.fill(-1)
        self.top_logprobs.fill(0.0)


class Workspace:
    """Arrays for calls of `choose`, made once and grown when more rows come.

    A step of few rows would spend more time on making arrays than on choosing.
    """

    def __init__(self, num_rows: int = 0) -> None:
        self._capacity = -1
        self._given: tuple[tuple[int, int], Choices] | None = None
        self._reserve(num_rows)

    def _reserve(self, num_rows: int) -> None:
        if num_rows <= self._capacity:
            return
        # All are made before any is let go: where memory runs out in between, the addresses
        # still are those of arrays that live.
        positions, params = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.uint64)
        masks, mask_words = np.zeros(num_rows, np.uint64), np.zeros(num_rows, np.int32)
        room = Choices(
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.uint8),
            np.zeros(num_rows, np.float64),
            np.zeros((num_rows, MAX_TOP), np.int32),
            np.zeros((num_rows, MAX_TOP), np.float64),
        )
        arrays: list[NDArray[Any]] = [params, positions, masks, mask_words]
        arrays += [room.tokens, room.faults, room.logprobs, room.top_ids, room.top_logprobs]
        addresses = [_address(array) for array in arrays]
        self.positions, self.params, self.masks, self.mask_words = (
            positions, params, masks, mask_words,
        )  # fmt: skip
        self._room, self.addresses, self._given = room, addresses, None
        self._capacity = num_rows

    def choices(self, num_rows: int, num_top: int) -> Choices:
        """Room for ``num_rows`` rows with ``num_top`` alternatives, holding anything."""
        self._reserve(num_rows)
        if self._given is None or self._given[0] != (num_rows, num_top):
            room = self._room
            self._given = (
                (num_rows, num_top),
                Choices(
                    room.tokens[:num_rows],
                    room.faults[:num_rows],
                    room.logprobs[:num_rows],
                    room.top_ids[:num_rows, :num_top],
                    room.top_logprobs[:num_rows, :num_top],
                ),
            )
        return self._given[1]


def choose(
    logits: F32,
    params: Sequence[RowParams],
    positions: Sequence[int] | I64,
    masks: Sequence[Mask | None] | None = None,
    *,
    backend: Literal["native", "reference"] | None = None,
    workspace: Workspace | None = None,
) -> Choices:
    """Choose one token per row.

    Args:
        logits: ``[W, V]`` float32, C-contiguous, read only.
        params: of each row's sequence; the same object may stand in several rows.
        positions: ``[W]`` absolute position of the token to be chosen.
        masks: per row the allowed tokens, or ``None`` for all.
        backend: force one implementation; by default native where it was built.
        workspace: where to work and answer; its last answer is overwritten.

    Returns:
        Tokens, fault codes and, for rows that asked, logprobs.
    """
    num_rows = logits.shape[0]
    workspace = workspace or Workspace(num_rows)
    wants = any(p.num_top >= 0 for p in params)
    choices = workspace.choices(num_rows, MAX_TOP if wants else 0)
    native = None if backend == "reference" else native_module()
    if native is not None:
        _choose_native(native, logits, params, positions, masks, workspace=workspace, wants=wants)
        return choices
    if backend == "native":
        raise ConfigError("The native sampler is not built; reinstall with a C++ compiler.")
    from coppice.kernels.sampling_reference import choose_row

    choices.fail()
    for i in range(num_rows):
        mask = masks[i] if masks is not None else None
        choose_row(logits[i], params[i], int(positions[i]), mask, out=choices, i=i)
    return choices


@functools.cache
def native_module() -> Any:
    """The extension, or ``None`` where it was not built."""
    try:
        module = importlib.import_module("coppice.kernels._native")
    except ImportError:
        return None
    return module if hasattr(module, "sample") else None  # an older build in a checkout


def _choose_native(
    native: Any,
    logits: F32,
    params: Sequence[RowParams],
    positions: Sequence[int] | I64,
    masks: Sequence[Mask | None] | None,
    *,
    workspace: Workspace,
    wants: bool,
) -> None:
    num_rows, vocab = logits.shape
    if not (logits.flags.c_contiguous and logits.dtype == np.float32):
        raise ValueError("logits must be contiguous float32")
    if not len(params) == len(positions) == num_rows:
        raise ValueError("params and positions need one entry per row")
    if num_rows == 1:  # a slice takes five times as long
        workspace.params[0] = params[0].address
        workspace.positions[0] = positions[0]
    else:
        workspace.params[:num_rows] = [p.address for p in params]
        workspace.positions[:num_rows] = positions
    where, at, mask_at, mask_words, *outputs = workspace.addresses
    if masks is None:
        mask_at = mask_words = 0
    else:
        workspace.masks[:num_rows] = [0 if m is None else _address(m) for m in masks]
        workspace.mask_words[:num_rows] = [0 if m is None else len(m) for m in masks]
    native.sample(
        _address(logits),
        where,
        at,
        mask_at,
        mask_words,
        *outputs,
        num_rows,
        vocab,
        MAX_TOP if wants else 0,
    )


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
