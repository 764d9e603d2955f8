"""What the engine said of a call and its reader has not taken yet."""

from __future__ import annotations

import asyncio

from coppice.engine.messages import Output

MAX_OUTPUTS = 1024
MAX_BYTES = 256 << 10
OUTPUT_BYTES = 256
SCORE_BYTES = 128
"""Of each alternative of a token with log-probabilities: a pair, its number and its place."""


class Unread(asyncio.Queue[Output]):
    """Outputs of a call's requests, in order.

    Args:
        choices: of all requests of the call; there is as much room for each.

    Attributes:
        size_bytes: what they take, nearly.
    """

    def __init__(self, choices: int = 1) -> None:
        super().__init__()
        self._choices = choices
        self.size_bytes = 0

    @property
    def too_many(self) -> bool:
        """The reader lags so far behind that no more should be made for it."""
        return (
            self.qsize() >= MAX_OUTPUTS * self._choices
            or self.size_bytes >= MAX_BYTES * self._choices
        )

    def _put(self, item: Output) -> None:
        super()._put(item)
        self.size_bytes += _bytes_of(item)

    def _get(self) -> Output:
        item = super()._get()
        self.size_bytes -= _bytes_of(item)
        return item


def _bytes_of(output: Output) -> int:
    scores = sum(1 + len(each.top) for each in output.logprobs or ())
    return OUTPUT_BYTES + SCORE_BYTES * scores
