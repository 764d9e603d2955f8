"""How byte-level vocabularies split text before merging, by the name GGUF files carry.

The patterns are those the models were trained with, as their ``tokenizer.json`` states them.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}"
_O200K = "|".join([*(part + _CONTRACTIONS + "?" for part in _CASED), r"\p{N}{1,3}", _TAIL_SLASH])
_TEKKEN = "|".join([*_CASED, r"\p{N}", _TAIL_SLASH])


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to split.

    Attributes:
        patterns: regular expressions whose matches are isolated; none means GPT-2's own.
        single_digits: every digit stands alone (before GPT-2's pattern).
        nfc: text is brought to Unicode NFC first.
        ignore_merges: a whole word in the vocabulary is taken without merging.
        adds_bos: a BOS is put in front where the file does not say otherwise.
    """

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = PreTokenizer()
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)

PRETOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,), nfc=True),
    "gpt-4o": PreTokenizer((_O200K,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
}
"""By ``tokenizer.ggml.pre``. Files too old to have the key count as ``default``."""
