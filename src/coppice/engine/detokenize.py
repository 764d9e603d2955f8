"""Tokens to text for one choice of one request: streamed, with stop strings.

`TextAssembler` sees tokens in whatever groups the engine sends them and handles them one by
one, so neither the text nor the stop point depends on the grouping. Text that a later token
could still change (an incomplete character, the beginning of a stop string) is held back.
The streamed pieces together equal ``Tokenizer.decode`` of the same tokens, up to the stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coppice.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """One generated token as log-probability replies show it.

    Attributes:
        token: its id.
        bytes: its exact bytes.
        offset: characters of answer text that were certain before it.
    """

    token: int
    bytes: bytes
    offset: int

    @property
    def text(self) -> str:
        """The bytes as UTF-8, with U+FFFD where they are only part of a character."""
        return self.bytes.decode("utf-8", "replace")


class TextAssembler:
    """Assembles one choice's text; one object per choice, used from one thread.

    Args:
        tokenizer: the model's.
        stop: stop strings; the first to be complete ends the text, the longest of several
            that are complete at the same character.
        include_stop: keep the stop string (or the text of the stop token).
        skip_special_tokens: special tokens contribute no text.
        keep_leading_space: the text continues a prompt (plain completions), so a
            SentencePiece word at its start keeps its space.
        min_tokens: stop strings complete before this many tokens do not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        keep_leading_space: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(dict.fromkeys(text for text in stop if text))
        self._include_stop = include_stop
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream = tokenizer.text_stream(keep_leading_space=keep_leading_space)
        self._min_tokens = min_tokens
        self._tail_size = max((len(text) for text in self._stops), default=1) - 1
        self._tail = ""  # the last certain characters, where a stop string may have begun
        self._held = ""  # certain, but perhaps the beginning of a stop string
        self._num_chars = 0  # certain characters, held ones included
        self._num_seen = 0
        self._finished = False
        self.tokens: list[TokenText] = []
        """One entry per kept token, in order."""
        self.stop_reason: str | None = None
        """The stop string that ended the text, once one has."""

    @property
    def num_tokens(self) -> int:
        """Tokens kept, up to and including the one that completed a stop string."""
        return self._num_seen

    def push(self, tokens: Sequence[int], *, stop_token: bool = False) -> str:
        """Add tokens and get the text that may be shown now.

        After a stop string (`stop_reason`) further tokens are ignored.

        Args:
            tokens: newly accepted ids, in order.
            stop_token: the last of them ended the sequence (EOS or a stop id). It is counted,
                and gives no text unless ``include_stop``.
        """
        parts: list[str] = []
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            if self.stop_reason is not None or self._finished:
                break
            hidden = token in self._skip or (
                stop_token and index == last and not self._include_stop
            )
            parts.append(self._add(token, hidden))
        return "".join(parts)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of any token, one that was not chosen, too."""
        return self._tokenizer.token_bytes(token)

    def flush(self) -> str:
        """End the text: everything held back, incomplete bytes as U+FFFD. Idempotent."""
        if self._finished or self.stop_reason is not None:
            self._finished = True
            return ""
        self._finished = True
        shown = self._advance(self._stream.finish())
        if self.stop_reason is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _add(self, token: int, hidden: bool) -> str:
        self._num_seen += 1
        self.tokens.append(TokenText(token, self._tokenizer.token_bytes(token), self._num_chars))
        piece = None if hidden else self._tokenizer.piece(token)
        return "" if piece is None else self._advance(self._stream.push(piece))

    def _advance(self, new: str) -> str:
        """Take certain text, look for stop strings, return what may be shown."""
        if not new:
            return ""
        if not self._stops:
            self._num_chars += len(new)
            return new
        window = self._tail + new
        found = self._find_stop(window, len(self._tail))
        if found is not None:
            return self._cut(window, *found)
        self._num_chars += len(new)
        self._tail = window[-self._tail_size :] if self._tail_size else ""
        pending = self._held + new
        keep = self._possible_start()
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def _find_stop(self, window: str, old: int) -> tuple[int, int, str] | None:
        """(end, start, stop) of the first complete stop string that ends in new text."""
        if self._num_seen < self._min_tokens:
            return None
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return best

    def _cut(self, window: str, end: int, start: int, stop: str) -> str:
        self.stop_reason = stop
        limit = end if self._include_stop else start
        # The window begins before the held text or with it; shown text is never taken back,
        # since any beginning of a stop string was held.
        shown_up_to = len(self._tail) - len(self._held)
        self._num_chars += limit - len(self._tail)
        self._held = ""
        return window[shown_up_to:limit]

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        tail, longest = self._tail, 0
        for stop in self._stops:
            start = tail.find(stop[0], max(0, len(tail) - len(stop) + 1))
            while start >= 0 and len(tail) - start > longest:
                if stop.startswith(tail[start:]):
                    longest = len(tail) - start
                    break
                start = tail.find(stop[0], start + 1)
        return longest
