"""How token ids become text, one token at a time, exactly as a whole-sequence decode would.

Two families cover the supported models. *Byte-level* tokens are bytes spelled with a fixed
alphabet, and the text is the UTF-8 reading of all bytes in a row. *Pieces* are strings with
a stand-in for the space, where ``<0xNN>`` tokens spell bytes the vocabulary lacks.

`TextStream` gives the text piece by piece and holds back what a later token could still
change. The concatenation equals ``tokenizers``' own ``decode`` of all the ids.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from coppice.errors import CheckpointError, UnsupportedModelError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level vocabularies spell bytes with.

    Source: Radford et al., "Language models are unsupervised multitask learners" (GPT-2).
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    table = {chr(byte): byte for byte in kept}
    table.update({chr(256 + index): byte for index, byte in enumerate(moved)})
    return table


_ALPHABET = byte_alphabet()


class TextStream(Protocol):
    """Turns one sequence of tokens into text. Held-back text comes with a later call."""

    def push(self, token: str) -> str:
        """Text that became certain with this vocabulary entry."""
        ...

    def finish(self) -> str:
        """What was still held back; incomplete bytes become U+FFFD."""
        ...


@dataclass(frozen=True)
class DecoderSpec:
    """What a ``tokenizer.json`` decoder does, reduced to the cases that exist in practice.

    Attributes:
        byte_level: tokens are bytes in the byte alphabet; the other fields are unused.
        replacements: literal replacements applied to every piece, in order.
        byte_fallback: ``<0xNN>`` pieces are bytes.
        strip_first: leading spaces removed from the text of the whole sequence.
        drop_first: characters removed from the first piece (``Metaspace``).
        separator: put between pieces (no decoder at all: a space).
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_first: int = 0
    drop_first: str = ""
    separator: str = ""

    def token_bytes(self, token: str) -> bytes:
        """The bytes one vocabulary entry contributes in the middle of a text."""
        if self.byte_level:
            return _level_bytes(token)
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        if match:
            return bytes([int(match.group(1), 16)])
        return self.piece_text(token).encode("utf-8", "replace")

    def piece_text(self, token: str) -> str:
        """A piece with its stand-ins replaced."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token

    def stream(self, *, keep_leading_space: bool = False) -> TextStream:
        """A fresh stream. ``keep_leading_space``: the text continues another one."""
        if self.byte_level:
            return _ByteStream()
        return _PieceStream(self, keep_leading_space)


def read_decoder(state: bytes | str | None) -> DecoderSpec:
    """Understand a ``tokenizers`` decoder from its JSON state.

    Raises:
        UnsupportedModelError: a decoder kind that no supported model uses.
        CheckpointError: the state is not a decoder.
    """
    spec = json.loads(state) if state else None
    if spec is None:
        return DecoderSpec(separator=" ")
    steps = _flatten(spec)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return DecoderSpec(byte_level=True)
    return _read_pieces(steps)


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(spec, dict) or "type" not in spec:
        raise CheckpointError("The tokenizer's decoder is malformed; download the file again.")
    if spec["type"] != "Sequence":
        return [spec]
    return [step for part in spec.get("decoders", []) for step in _flatten(part)]


def _read_pieces(steps: list[dict[str, Any]]) -> DecoderSpec:
    replacements: list[tuple[str, str]] = []
    byte_fallback, fused, strip_first, drop_first = False, False, 0, ""
    for step in steps:
        kind = step["type"]
        pattern = step.get("pattern", {})
        if kind == "Replace" and not byte_fallback and not fused and "String" in pattern:
            replacements.append((pattern["String"], step["content"]))
        elif kind == "ByteFallback" and not fused:
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Metaspace" and not fused and not byte_fallback:
            replacements.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                drop_first = step["replacement"]
        elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
            strip_first += step["start"]
        else:
            raise UnsupportedModelError(
                f"The tokenizer's decoder step {kind!r} is not supported; use a byte-level or "
                "SentencePiece-style tokenizer.json."
            )
    return DecoderSpec(
        replacements=tuple(replacements),
        byte_fallback=byte_fallback,
        strip_first=strip_first,
        drop_first=drop_first,
    )


def _level_bytes(token: str) -> bytes:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:  # an added token outside the alphabet stands for its own UTF-8
        return token.encode("utf-8", "replace")


class _ByteStream:
    """All bytes in a row read as UTF-8; the codec holds an incomplete character."""

    def __init__(self) -> None:
        self._decode: Callable[..., str] = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: str) -> str:
        return self._decode(_level_bytes(token))

    def finish(self) -> str:
        return self._decode(b"", True)


class _PieceStream:
    """Pieces joined; a run of byte tokens is held until it ends.

    NOTE: ``tokenizers`` reads a run of byte tokens as a whole and replaces *every* byte of an
    invalid run, so nothing of a run is certain before it is over.
    """

    def __init__(self, spec: DecoderSpec, keep_leading_space: bool) -> None:
        self._spec = spec
        self._run = bytearray()
        self._to_strip = 0 if keep_leading_space else spec.strip_first
        self._first = not keep_leading_space
        self._started = False

    def push(self, token: str) -> str:
        spec = self._spec
        match = _BYTE_TOKEN.fullmatch(token) if spec.byte_fallback else None
        if match:
            self._run.append(int(match.group(1), 16))
            return ""
        if self._first and spec.drop_first:
            token = token.replace(spec.drop_first, "")
        piece = spec.piece_text(token)
        if spec.separator and self._started:
            piece = spec.separator + piece
        self._first, self._started = False, True
        return self._strip(self._end_run() + piece)

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        self._first = self._first and not run
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        while self._to_strip and text.startswith(" "):
            text = text[1:]
            self._to_strip -= 1
        if text:
            self._to_strip = 0
        return text
