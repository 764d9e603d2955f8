"""Lays granted rows out as the arrays of one flight."""

from __future__ import annotations

import numpy as np
import torch

from coppice.engine.sequence import Sequence
from coppice.kernels.rows import Rows
from coppice.speculation import DraftTree


class PageTable:
    """The pages of every running sequence, a row of page ids each.

    Args:
        max_sequences: rows, one a running sequence.
        max_pages: pages a sequence may hold.
    """

    def __init__(self, max_sequences: int, max_pages: int) -> None:
        self._pages = np.full((max_sequences, max_pages), -1, dtype=np.int32)
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self.max_sequences = max_sequences
        self.view = torch.from_numpy(self._pages)

    def take_slot(self, sequence: Sequence) -> None:
        """Give a sequence its row."""
        sequence.slot = self._free_slots.pop()
        self.write(sequence, 0)

    def free_slot(self, sequence: Sequence) -> None:
        """Take the row back."""
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def write(self, sequence: Sequence, first: int) -> None:
        """Copy the sequence's page ids from ``first`` on into its row."""
        self._pages[sequence.slot, first : len(sequence.pages)] = sequence.pages[first:]


class BatchLayout:
    """Reusable host arrays for flights of up to ``max_rows`` rows.

    Args:
        max_rows: rows a flight may have.
        table: where the pages of its sequences are.
    """

    def __init__(self, max_rows: int, table: PageTable) -> None:
        fields = np.zeros((6, max_rows), dtype=np.int32)
        fields[5] = -1  # no adapters yet
        self._token, self._position, self._owner, self._parent, self._slot, _ = fields
        self._logit_rows = np.zeros(max_rows, dtype=np.int32)
        self._prefix_len = np.zeros(table.max_sequences, dtype=np.int32)
        self._num_rows = 0
        self._num_logits = 0
        self._views = [torch.from_numpy(row) for row in fields]
        self._logit_view = torch.from_numpy(self._logit_rows)
        self._prefix_view = torch.from_numpy(self._prefix_len)
        self._table_view = table.view
        self._last: tuple[tuple[int, int], Rows] | None = None
        # A decode writes one number to each: a view of the same memory that is quick at that.
        arrays = [*fields[:5], self._prefix_len, self._logit_rows]
        self._one = [memoryview(array) for array in arrays]

    def clear(self) -> None:
        """Begin a flight."""
        self._num_rows = 0
        self._num_logits = 0

    def add(self, sequence: Sequence, num_rows: int, tree: DraftTree | None = None) -> int | None:
        """Append the next ``num_rows`` tokens of a sequence, and its speculated ones.

        Args:
            sequence: whose tokens.
            num_rows: committed tokens.
            tree: what may follow the last of them.

        Returns:
            If the last of them is the sequence's last token, the place of its logits among
            the flight's; those of tree node ``i`` are ``i + 1`` places on.
        """
        start = sequence.num_computed
        end = start + num_rows
        if num_rows == 1:
            row = self._add_one(sequence, start)
        else:
            row = self._add_chunk(sequence, start, end)
        if end < len(sequence.tokens):
            return None
        place = self._num_logits
        self._one[6][place] = row
        self._num_logits = place + 1
        if tree is not None:
            self._add_tree(sequence, tree)
        return place

    def _add_one(self, sequence: Sequence, at: int) -> int:
        token, position, owner, parent, slot, prefix_len, _ = self._one
        row, place = self._num_rows, sequence.slot
        token[row] = sequence.tokens[at]
        position[row] = slot[row] = prefix_len[place] = at
        owner[row] = place
        parent[row] = -1
        self._num_rows = row + 1
        return row

    def _add_chunk(self, sequence: Sequence, start: int, end: int) -> int:
        a, b = self._num_rows, self._num_rows + end - start
        self._token[a:b] = sequence.tokens[start:end]
        self._position[a:b] = self._slot[a:b] = np.arange(start, end)
        self._owner[a:b] = sequence.slot
        self._parent[a:b] = np.arange(a - 1, b - 1)
        self._parent[a] = -1
        self._prefix_len[sequence.slot] = start
        self._num_rows = b
        return b - 1

    def _add_tree(self, sequence: Sequence, tree: DraftTree) -> None:
        """Rows of the nodes: a depth's position, and slots in the order of the nodes."""
        a, b = self._num_rows, self._num_rows + len(tree)
        end = len(sequence.tokens)
        self._token[a:b] = tree.tokens
        self._position[a:b] = np.array(tree.depths()) + (end - 1)
        self._owner[a:b] = sequence.slot
        self._parent[a:b] = np.array(tree.parents) + a  # the root's row stands just before
        self._slot[a:b] = np.arange(end, end + len(tree))
        self._logit_rows[self._num_logits : self._num_logits + len(tree)] = np.arange(a, b)
        self._num_rows = b
        self._num_logits += len(tree)

    def rows(self) -> Rows:
        """The flight's rows; views into this object's arrays, valid until `clear`.

        Flights with as many rows and wanted logits as the one before share one object.
        """
        sizes = self._num_rows, self._num_logits
        if self._last is None or self._last[0] != sizes:
            self._last = sizes, self._view()
        return self._last[1]

    def _view(self) -> Rows:
        """The arrays' first ``_num_rows`` and ``_num_logits`` entries."""
        token, position, owner, parent, slot, adapter = (
            view[: self._num_rows] for view in self._views
        )
        return Rows(
            token=token,
            position=position,
            sequence=owner,
            parent=parent,
            slot=slot,
            adapter=adapter,
            logit_rows=self._logit_view[: self._num_logits],
            page_table=self._table_view,
            prefix_len=self._prefix_view,
        )
