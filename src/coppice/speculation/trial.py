"""Whether a proposer is worth asking at all, by what it saved and what it cost.

The controller predicts; this keeps the books. A proposer whose guesses have cost more than
they saved rests until the loss is paid back: over any long stretch it takes no more than
`MOST_LOSS` of the time, however wrong the predictions are.
"""

from __future__ import annotations

MOST_LOSS = 0.01
"""Part of the time that trials may lose."""
STEPS = 16
"""Asked steps before a verdict: a draft model reads the prompt first."""
ALLOWED, REMEMBERED = 2.0, 8.0
"""Steps' worth of loss that is borne, and of gain that may be lost again."""
HOPELESS = 40.0
"""Steps' worth of loss that ends a trial at once."""


class Trial:
    """One proposer's account, in units of a plain step."""

    def __init__(self) -> None:
        self._balance = 0.0
        self._asked = 0
        self._rest = 0

    @property
    def on(self) -> bool:
        """Whether it may be asked."""
        return self._rest == 0

    def rest(self) -> None:
        """A step went by without it."""
        if self._rest:
            self._rest -= 1

    def asked(self, saved: float, spent: float) -> None:
        """A step in which it was asked.

        Args:
            saved: plain steps that its accepted guesses made unnecessary.
            spent: what asking and verifying took, in plain steps.
        """
        self._asked += 1
        self._balance = min(REMEMBERED, self._balance + saved - spent)
        loss = -self._balance
        if loss > HOPELESS or (loss > ALLOWED and self._asked >= STEPS):
            self._rest = max(1, int(loss / MOST_LOSS))
            self._balance, self._asked = 0.0, 0
