"""Small real tokenizers for tests: byte-level BPE, and SentencePiece-style with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "It was the best of times, it was the worst of times; déjà vu, naïve café.",
    "你好,世界!こんにちは 🙂🙃 👩‍👩‍👧 Здравствуй, мир",
    "def main():\n    print('hello world')\n\n\treturn 0  # stop stopping stops",
]
BYTE_LEVEL_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(vocab_size: int = 400) -> Tokenizer:
    """A GPT-2 style tokenizer with three special tokens and one plain added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=BYTE_LEVEL_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """A Llama 2 style tokenizer: pieces with U+2581, byte tokens, BOS added in front.

    ``strip=False`` is Gemma's variant, which keeps leading spaces.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = list("▁abcdefghijklmnopqrstuvwxyzTI.,é你好")
    words = ["▁t", "he", "▁the", "st", "sto", "stop", "▁▁", "▁▁▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("s", "t"), ("st", "o"), ("sto", "p")]
    merges += [("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *letters, *words])}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece-style pieces without byte tokens, with the ``Metaspace`` decoder."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def words() -> Tokenizer:
    """Whole words and no decoder at all: ``decode`` puts spaces between them."""
    vocab = {word: index for index, word in enumerate(["<unk>", "a", "b", "stop", ".", "<e>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<e>"])
    return tokenizer


def save_folder(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
