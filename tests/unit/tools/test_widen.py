"""A widened model computes what the small one computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.models.load import load_model
from tests.kits.models import SMALL
from tools.widen import widen

LARGE = {
    "model_type": "qwen2",
    "vocab_size": 5000,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


def logits(model: str | Path, tokens: list[int]) -> Tensor:
    """Of every position, in float32."""
    decoder = load_model(model, dtype="float32").decoder
    pool = KVPool(decoder.kv_layout(32), 8)
    return decoder.forward(Rows.chunk(tokens, list(range(8))), pool)


def test_logits_stay_and_added_tokens_never_win(tmp_path: Path) -> None:
    widen(Path(SMALL), LARGE, tmp_path)
    tokens = [(7919 * i) % 4096 for i in range(200)]
    small, large = logits(SMALL, tokens), logits(tmp_path, tokens)
    shift = (large[:, :4096] - small).mean(1, keepdim=True)  # the marked dim adds a constant
    assert (large[:, :4096] - small - shift).abs().max() < 2e-4  # a quarter: exact in bf16
    assert torch.equal(large.argmax(1), small.argmax(1))
    assert (large[:, 4096:].amax(1) < small.amin(1) - 10).all()


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_shape_that_is_not_larger_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=r"larger|grow"):
        widen(Path(SMALL), {**LARGE, name: 1}, tmp_path)
