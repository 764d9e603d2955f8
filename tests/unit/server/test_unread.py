"""How far a reader may lag behind."""

from __future__ import annotations

import sys

import pytest

from coppice.engine.messages import Output, TokenLogprob
from coppice.server.unread import MAX_BYTES, MAX_OUTPUTS, Unread, _bytes_of


def scored(alternatives: int) -> Output:
    top = [(1000 + n, -1.5 * n) for n in range(alternatives)]
    return Output(request_id="r", tokens=[5], logprobs=[TokenLogprob(5, -0.1, top)])


@pytest.mark.parametrize(
    ("output", "most"),
    [(Output(request_id="r", tokens=[5]), MAX_OUTPUTS), (scored(0), 683), (scored(20), 90)],
)
def test_a_reader_may_lag_by_outputs_and_by_their_bytes(output: Output, most: int) -> None:
    queue = Unread()
    for count in range(MAX_OUTPUTS):
        assert queue.too_many == (count >= most)
        queue.put_nowait(output)
    assert queue.too_many
    for _ in range(MAX_OUTPUTS):
        assert queue.get_nowait() is output
    assert not queue.too_many and queue.size_bytes == 0


def test_every_choice_has_as_much_room() -> None:
    queue = Unread(choices=16)
    for _ in range(16 * 89):
        queue.put_nowait(scored(20))
    assert queue.size_bytes > 15 * MAX_BYTES and not queue.too_many
    for _ in range(16):
        queue.put_nowait(scored(20))
    assert queue.too_many


@pytest.mark.parametrize("alternatives", [0, 1, 5, 20])
def test_the_bytes_are_nearly_those_it_takes(alternatives: int) -> None:
    def deep(value: object) -> int:
        parts = value if isinstance(value, list | tuple) else ()
        fields = [getattr(value, name) for name in getattr(value, "__struct_fields__", ())]
        return sys.getsizeof(value) + sum(map(deep, [*parts, *fields]))

    assert (
        deep(scored(alternatives)) / 2
        < _bytes_of(scored(alternatives))
        < 2 * deep(scored(alternatives))
    )
