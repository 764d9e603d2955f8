"""The tokenizer stored in a GGUF file's metadata, rebuilt as a ``tokenizers`` object.

``gpt2`` is byte-level BPE with merges and a named pre-tokenizer; ``llama`` is SentencePiece
BPE given by scores, from which merges are derived. Other kinds are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex as TokenizerRegex
from tokenizers import Tokenizer as Backend

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.gguf.pretokenizers import PRETOKENIZERS, PreTokenizer
from coppice.models.gguf.reader import GGUFReader, StringArray
from coppice.models.tokenizer import PROBE, Tokenizer, TokenizerFacts, refusing

MAX_VOCAB = 4 << 20
MAX_PIECE = 512
MAX_SPLITS = 64
"""Ways to build a piece of two pieces, on average over the vocabulary; real ones have a few."""

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_END_OF_TURN = frozenset(
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"]
)
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Rebuild the file's tokenizer.

    Raises:
        CheckpointError: its parts are missing or contradict each other.
        UnsupportedModelError: a tokenizer model or pre-tokenizer that is not built.
    """
    with refusing(reader.path.name):
        tokenizer = _build(_Parts(reader))
        tokenizer.decode(tokenizer.encode(PROBE))
    return tokenizer


def _build(parts: _Parts) -> Tokenizer:
    kind = parts.text("model")
    if kind == "gpt2":
        backend = _byte_level(parts)
    elif kind == "llama":
        backend = _sentencepiece(parts)
    else:
        raise UnsupportedModelError(
            f"GGUF tokenizer {str(kind)[:40]!r} is not supported; supported are 'gpt2' and 'llama'."
        )
    _add_tokens(backend, parts)
    facts = _facts(parts)
    if facts.add_bos and "bos_token" in facts.special_tokens:
        _prepend_bos(backend, facts.special_tokens["bos_token"])
    return Tokenizer(backend, facts)


class _Parts:
    """The ``tokenizer.*`` metadata, checked."""

    def __init__(self, reader: GGUFReader) -> None:
        self._metadata = reader.metadata
        self.tokens = self._strings("tokens")
        if not 0 < len(self.tokens) <= MAX_VOCAB:
            raise self.wrong(f"it has {len(self.tokens)} tokens")
        self.vocab = {token: index for index, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise self.wrong("a token appears twice")
        self.types = self._numbers("token_type", 1)

    def text(self, key: str, default: str | None = None) -> str | None:
        found = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if found is not None and not isinstance(found, str):
            raise self.wrong(f"{key} is not a string")
        return found

    def flag(self, key: str) -> bool | None:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and not isinstance(found, bool):
            raise self.wrong(f"{key} is not true or false")
        return found

    def token_id(self, key: str) -> int | None:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.wrong(f"{key} is not a token id")
        return found if 0 <= found < len(self.tokens) else None

    def merges(self) -> list[tuple[str, str]]:
        found = []
        for merge in self._strings("merges"):
            left, space, right = merge.partition(" ")
            known = left in self.vocab and right in self.vocab and left + right in self.vocab
            if not space or not known:
                raise self.wrong(f"the merge {merge[:80]!r} names tokens that are not there")
            found.append((left, right))
        return found

    def scores(self) -> Sequence[float]:
        if "tokenizer.ggml.scores" not in self._metadata:
            raise self.wrong("it has no scores")
        return self._numbers("scores", 0)

    def templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        found = {}
        for key, value in self._metadata.items():
            if isinstance(value, str) and (key == prefix or key.startswith(prefix + ".")):
                found[key[len(prefix) + 1 :] or "default"] = value
        return found

    def wrong(self, fault: str) -> CheckpointError:
        return CheckpointError(f"The GGUF file's tokenizer is damaged: {fault}.")

    def _strings(self, key: str) -> list[str]:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(found, StringArray):
            raise self.wrong(f"it has no {key}")
        return found.decode()

    def _numbers(self, key: str, default: int) -> Sequence[Any]:
        found = self._metadata.get(f"tokenizer.ggml.{key}")
        if found is None:
            return [default] * len(self.tokens)
        if not isinstance(found, np.ndarray) or len(found) != len(self.tokens):
            raise self.wrong(f"{key} does not have one entry per token")
        values: list[Any] = found.tolist()
        return values


def _byte_level(parts: _Parts) -> Backend:
    name = parts.text("pre", "default")
    pre = PRETOKENIZERS.get(name or "default")
    if pre is None:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {str(name)[:40]!r} is not supported; supported are "
            f"{', '.join(sorted(PRETOKENIZERS))}."
        )
    model = models.BPE(vocab=parts.vocab, merges=parts.merges(), ignore_merges=pre.ignore_merges)
    backend = Backend(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def pre_tokenizer(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The ``tokenizers`` object that splits text as ``pre`` says."""
    steps: list[Any] = [
        pre_tokenizers.Split(TokenizerRegex(pattern), behavior="isolated", invert=False)
        for pattern in pre.patterns
    ]
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre.patterns))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(parts: _Parts) -> Backend:
    unknown = parts.token_id("unknown_token_id")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(parts.types) if kind == _UNKNOWN), None)
    has_bytes = _BYTE in parts.types
    model = models.BPE(
        vocab=parts.vocab,
        merges=_merges_from_scores(parts),
        unk_token=None if unknown is None else parts.tokens[unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    backend = Backend(model)
    prefix = parts.flag("add_space_prefix") is not False
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _merges_from_scores(parts: _Parts) -> list[tuple[str, str]]:
    """All ways to build a piece of two pieces, best score first.

    SentencePiece merges the neighbouring pair whose union scores highest; ranking pairs by
    that score gives the same result. Ties go to the pair of lower ids.
    """
    vocab, scores = parts.vocab, parts.scores()
    ranked: list[tuple[float, int, int]] = []
    for index, piece in enumerate(parts.tokens):
        if parts.types[index] in (_UNKNOWN, _CONTROL, _BYTE) or len(piece) > MAX_PIECE:
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-float(scores[index]), left, right))
        if len(ranked) > MAX_SPLITS * len(parts.tokens):
            raise parts.wrong("its pieces can be split in too many ways")
    ranked.sort()
    return [(parts.tokens[left], parts.tokens[right]) for _, left, right in ranked]


def _add_tokens(backend: Backend, parts: _Parts) -> None:
    """Control tokens are special; user-defined ones are whole tokens of plain text."""
    added = []
    for token, kind in zip(parts.tokens, parts.types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED) and token:
            special = kind == _CONTROL
            added.append(AddedToken(token, special=special, normalized=False))
    backend.add_tokens([token for token in added if not token.special])
    backend.add_special_tokens([token for token in added if token.special])


def _facts(parts: _Parts) -> TokenizerFacts:
    specials = {}
    for name, key in _NAMED.items():
        index = parts.token_id(key)
        if index is not None and parts.tokens[index]:
            specials[name] = parts.tokens[index]
    ends = [parts.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ends += [
        index
        for index, (token, kind) in enumerate(zip(parts.tokens, parts.types, strict=True))
        if kind == _CONTROL and token in _END_OF_TURN
    ]
    add_bos = parts.flag("add_bos_token")
    if add_bos is None:  # what llama.cpp assumes where the file does not say
        pre = PRETOKENIZERS.get(parts.text("pre", "default") or "default")
        add_bos = parts.text("model") == "llama" or (pre is not None and pre.adds_bos)
    return TokenizerFacts(
        special_tokens=specials,
        eos_ids=tuple(dict.fromkeys(index for index in ends if index is not None)),
        add_bos=add_bos,
        chat_templates=parts.templates(),
    )


def _prepend_bos(backend: Backend, bos: str) -> None:
    index = backend.token_to_id(bos)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, index)]
    )
