"""The GGUF files llama.cpp is measured with hold the very models it is compared on."""

from __future__ import annotations

import pytest
import torch

from coppice.cache.pool import KVPool
from coppice.kernels.rows import Rows
from coppice.models.load import load_model
from coppice.models.locate import locate
from coppice.models.tokenizer import Tokenizer
from tools import make_model
from tools.peers.to_gguf import write_gguf

MORE_ROWS_THAN_TOKENS = {"vocab_size": 4200, "num_hidden_layers": 2}


def logits(model):
    decoder = load_model(str(model), dtype="auto").decoder
    pool = KVPool(decoder.kv_layout(16), 4)
    tokens = [(7 * i * i + 5) % 4000 for i in range(40)]
    return decoder.forward(Rows.chunk(tokens, [2, 0, 3]), pool)


@pytest.mark.parametrize("shape", ["toy-qwen2", "toy-llama", "toy-llama-bands"])
def test_a_random_model_keeps_every_bit(shape, tmp_path, monkeypatch):
    base = make_model.SHAPES[shape.removesuffix("-bands")]
    extra = {"rope_scaling": make_model.LLAMA3_SCALING} if shape.endswith("-bands") else {}
    config = {**base, **MORE_ROWS_THAN_TOKENS, **extra, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    monkeypatch.setitem(make_model.SHAPES, shape, config)
    make_model.make_model(shape, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    torch.testing.assert_close(
        logits(tmp_path / "model.gguf"), logits(tmp_path / "model"), rtol=0, atol=0
    )


def test_the_bundled_model_and_its_tokenizer(tmp_path):
    folder, out = locate("bundled"), tmp_path / "bundled.gguf"
    write_gguf(folder, out)
    torch.testing.assert_close(logits(out), logits(folder), rtol=0, atol=0)
    text = "def main(argv):\n    return 42  # naïve café, 日本\n<|im_end|>"
    source = load_model(str(out), dtype="auto").tokenizer_source
    assert source.tokenizer.encode(text) == Tokenizer.from_folder(folder).encode(text)


def test_other_architectures_are_refused_by_name(tmp_path):
    make_model.make_model("toy-gemma2", tmp_path)
    with pytest.raises(ValueError, match="gemma2 models are not written"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
