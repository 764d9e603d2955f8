"""The batch of one step: rows of (token, position, sequence, parent, adapter, wants-logits).

A prefill chunk, a decode token and a node of a speculated tree are all rows. The forward
pass reads these arrays and knows nothing else about where a row came from.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One step's rows as struct of arrays. All tensors are int32 on the model's device.

    Row ``i`` may attend, in this order, to the first ``prefix_len[sequence[i]]`` slots of
    its sequence, then to its ancestors' slots (following ``parent`` up to -1, oldest
    first), then to its own slot. Parents stand before children. In a plain chunk each
    row's parent is the row before it and ``slot == position``; in a token tree siblings
    share a position and differ in slot.

    Attributes:
        token: ``[T]`` token ids.
        position: ``[T]`` rotary positions.
        sequence: ``[T]`` index into ``page_table`` and ``prefix_len``.
        parent: ``[T]`` row index of the preceding token in this batch, or -1 when the
            preceding token is the last cached one of the sequence (or there is none).
        slot: ``[T]`` where the row's K and V go: a token index into its sequence's pages,
            ``page_table[sequence, slot // page_size]`` at offset ``slot % page_size``.
        adapter: ``[T]`` adapter index, -1 for none.
        logit_rows: ``[W]`` the rows whose logits are wanted, ascending.
        page_table: ``[S, max_pages]`` page ids, -1 beyond a sequence's end.
        prefix_len: ``[S]`` cached tokens visible to every row of the sequence.
    """

    token: Tensor
    position: Tensor
    sequence: Tensor
    parent: Tensor
    slot: Tensor
    adapter: Tensor
    logit_rows: Tensor
    page_table: Tensor
    prefix_len: Tensor

    @property
    def num_rows(self) -> int:
        """``T``."""
        return self.token.shape[0]

    def to(self, device: torch.device) -> Rows:
        """The same rows on ``device``; itself when they are there already."""
        if self.token.device == device:
            return self
        return Rows(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})

    @classmethod
    def chunk(cls, tokens: list[int], pages: list[int], start: int = 0) -> Rows:
        """Rows of one sequence's consecutive tokens, logits wanted for all (tests, scoring)."""
        n = len(tokens)
        i32 = torch.int32
        return cls(
            token=torch.tensor(tokens, dtype=i32),
            position=torch.arange(start, start + n, dtype=i32),
            sequence=torch.zeros(n, dtype=i32),
            parent=torch.arange(-1, n - 1, dtype=i32),
            slot=torch.arange(start, start + n, dtype=i32),
            adapter=torch.full((n,), -1, dtype=i32),
            logit_rows=torch.arange(n, dtype=i32),
            page_table=torch.tensor([pages], dtype=i32),
            prefix_len=torch.tensor([start], dtype=i32),
        )
