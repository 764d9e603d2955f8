"""Bits per byte of a loaded model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional

from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.models.tokenizer import Tokenizer

WINDOW = 512
PAGE_SIZE = 32


def windows(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    """Up to ``most`` windows of ``WINDOW + 1`` tokens, evenly over the texts.

    A window sees nothing of the one before it; its first token is given, not scored.
    """
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    count = (len(ids) - 1) // WINDOW
    picked = [i * count // most for i in range(most)] if count > most else range(count)
    return [ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in picked]


@torch.inference_mode()
def bits_per_byte(
    decoder: Decoder,
    tokenizer: Tokenizer,
    pieces: Sequence[list[int]],
    kv: Literal["auto", "int8"] = "auto",
) -> float:
    """Cross entropy of the windows in bits per byte of their UTF-8 text."""
    pages = list(range(-(-WINDOW // PAGE_SIZE)))
    pool = KVPool(decoder.kv_layout(PAGE_SIZE).stored_as(kv), len(pages))
    nats, num_bytes = 0.0, 0
    for piece in pieces:
        logits = decoder.forward(Rows.chunk(piece[:-1], pages), pool)  # [T, V]
        wanted = torch.tensor(piece[1:])
        nats += functional.cross_entropy(logits, wanted, reduction="sum").item()
        num_bytes += len(tokenizer.decode(piece[1:]).encode())
    return nats / math.log(2) / num_bytes
