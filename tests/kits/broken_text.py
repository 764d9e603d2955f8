"""`tests.kits.serve_main` with a tokenizer that fails over some requests, as a bug in it would.

Which one, and where, is said by the request's seed; a text with `UNREADABLE` in it cannot be
tokenized at all.
"""

from __future__ import annotations

from typing import Any

from coppice.engine.detokenize import TextAssembler
from coppice.engine.request import Request
from coppice.models.tokenizer import Tokenizer
from coppice.server.text import TextService
from tests.kits import serve_main

SECRET = "what the library said"
BUG, PANIC, SCORES, END = 771, 772, 773, 774
"""Seeds: at the fifth token, the same with a panic, at its alternatives, at the answer's end."""
FAULTS = (BUG, PANIC, SCORES, END)
UNREADABLE = "(unreadable)"


class PanicError(BaseException):
    """Like what Rust libraries raise: no `Exception`."""


class BrokenTokenizer:
    """A tokenizer whose reading of tokens goes wrong."""

    def __init__(self, tokenizer: Tokenizer, fault: int) -> None:
        self._tokenizer = tokenizer
        self._fault = fault
        self._own = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def piece(self, token: int) -> str | None:
        self._own += 1
        if self._own == 5 and self._fault in (BUG, PANIC):
            raise RuntimeError(SECRET) if self._fault == BUG else PanicError(SECRET)
        return self._tokenizer.piece(token)


class BrokenStream:
    """A text stream that cannot be ended."""

    def __init__(self, stream: Any) -> None:
        self.push = stream.push

    def finish(self) -> str:
        raise KeyError(SECRET)


class BrokenAssembler(TextAssembler):
    """Goes wrong as `FAULTS` says."""

    fault = 0

    @classmethod
    def of(cls, made: TextAssembler, fault: int | None) -> TextAssembler:
        """The same, broken if its request has one of the seeds."""
        if fault in FAULTS:
            made.__class__, made.fault = cls, fault
            made._tokenizer = BrokenTokenizer(made._tokenizer, fault)
            if fault == END:
                made._stream = BrokenStream(made._stream)
        return made

    def token_bytes(self, token: int) -> bytes:
        if self.fault == SCORES and self.num_tokens >= 5:
            raise UnicodeError(SECRET)
        return super().token_bytes(token)


def break_assemblers() -> None:
    """Put it in the front end's place."""
    real = TextService.assembler

    def assembler(self: TextService, request: Request, *, continues_prompt: bool) -> TextAssembler:
        made = real(self, request, continues_prompt=continues_prompt)
        return BrokenAssembler.of(made, request.sampling.seed)

    TextService.assembler = assembler


def break_reading() -> None:
    """Tokenizing panics over some texts."""
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if UNREADABLE in text:
            raise PanicError(SECRET)
        return real(self, text, **options)

    Tokenizer.encode = encode


if __name__ == "__main__":
    break_assemblers()
    break_reading()
    raise SystemExit(serve_main.main())
