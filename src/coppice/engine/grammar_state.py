"""Where a sequence stands in its grammar, and what may follow."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher

from coppice.engine.grammar import first_line
from coppice.errors import GrammarError, RowFaultError
from coppice.kernels.sampling import Mask


class GrammarState:
    """Where one sequence stands in its grammar.

    Attributes:
        num_words: int32 words in a mask, ``ceil(tokenizer.vocab_size / 32)``.
    """

    __slots__ = ("_address", "_mask", "_matcher", "num_words")

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self.num_words = num_words
        self._mask: Mask = np.zeros(num_words, np.int32)
        self._address: int = self._mask.__array_interface__["data"][0]

    def mask(self) -> Mask:
        """The tokens allowed next, in this state's own array, valid until the next call.

        Raises:
            GrammarError: the grammar became too complex here; fail this request.
        """
        self._matcher.unsafe_compute_mask_ptr(self._address, 4 * self.num_words)
        self._check()
        return self._mask

    def fill_mask(self, row: Mask) -> None:
        """Write the allowed tokens to ``row``, int32 of at least ``num_words``."""
        row[: self.num_words] = self.mask()
        row[self.num_words :] = 0

    def accept(self, token: int) -> None:
        """Advance over a chosen token.

        Raises:
            GrammarError: the grammar became too complex here; fail this request.
            RowFaultError: the token is not allowed here.
        """
        if not self._matcher.consume_token(token):
            self._check()
            raise RowFaultError("The grammar does not allow the chosen token.")

    def rollback(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` accepted tokens."""
        if num_tokens and not self._matcher.rollback(num_tokens):
            self._check()

    def fork(self) -> GrammarState:
        """An independent copy."""
        return GrammarState(self._matcher.deep_copy(), self.num_words)

    @property
    def is_stopped(self) -> bool:
        """Whether nothing but an ending token can follow: the sequence is done."""
        return bool(self._matcher.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the text so far satisfies the grammar (more may still be allowed)."""
        return bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            why = first_line(self._matcher.get_error())
            raise GrammarError(f"The grammar became too complex over this answer: {why}.")
