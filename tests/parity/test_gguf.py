"""A GGUF file and the safetensors checkpoint it was made from are the same model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend

from coppice import LLM, SamplingParams
from coppice.cache.pool import KVPool
from coppice.kernels import get_ops
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.models.load import load_model
from coppice.models.locate import locate
from coppice.models.tokenizer import Tokenizer
from tests.kits import toy_tokenizers
from tests.kits.gguf_writer import convert
from tests.parity.toys import HEADS, LLAMA3, TIED, UNTIED, WIDE, YARN, longrope, reference, rope

pytest.importorskip("transformers")

PAGES, PAGE_SIZE, GREEDY = 12, 16, 16
REAL_LLAMA3 = {
    "rope_parameters": {**LLAMA3["rope_parameters"], "original_max_position_embeddings": 8192}
}
TOYS: dict[str, dict[str, Any]] = {
    "llama": {**HEADS[1], **UNTIED},
    "llama_bias": {**HEADS[1], **TIED, "attention_bias": True, "mlp_bias": True},
    "llama_bands": {**HEADS[1], **REAL_LLAMA3, "head_dim": 32},
    "llama_yarn": {**WIDE[2], **YARN},
    "mistral": {**HEADS[1], "sliding_window": 20},
    "mistral_linear": {**HEADS[2], "sliding_window": 16, **rope(rope_type="linear", factor=3.0)},
    "mixtral": {**HEADS[1], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**HEADS[1], **TIED},
    "qwen3": {**WIDE[1]},
    "qwen3_moe": {
        **WIDE[0],
        "num_experts": 5,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gemma2": {**WIDE[0], "sliding_window": 20, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **WIDE[1],
        "sliding_window": 20,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 24,
    },
    "phi3": {**HEADS[0], "sliding_window": 33},
    "phi3_longrope": {**HEADS[1], **longrope(6, partial_rotary_factor=0.75), "hidden_size": 64},
    "olmo2": {**HEADS[1], **UNTIED},
}
WIDE_LLAMA = {
    **HEADS[1],
    **UNTIED,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "vocab_size": 96,
}


def save(name: str, folder: Path, settings: dict[str, Any]) -> Path:
    first = name.partition("_")[0]
    family = name if first in ("gemma3", "qwen3") else first
    reference(family, copy.deepcopy(settings), seed=42).save_pretrained(folder)
    return folder


def prompt(vocab: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocab, (80,), generator=generator).tolist()


@torch.inference_mode()
def answer(decoder: Decoder, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
    """All logits of the prompt, and a greedy continuation."""
    pool = KVPool(decoder.kv_layout(PAGE_SIZE), PAGES + 1)
    pages = list(range(1, PAGES + 1))
    logits = decoder.forward(Rows.chunk(tokens, pages, start=0), pool)
    found, last, start = [], logits, len(tokens)
    for _ in range(GREEDY):
        found.append(int(last[-1].argmax()))
        last = decoder.forward(Rows.chunk(found[-1:], pages, start=start), pool)
        start += 1
    return logits, found


def compare(ours: Path, theirs: Path, dtype: str = "float32", rows: str | None = None) -> None:
    """Bitwise equal logits and equal greedy tokens; ``rows``: how ours are multiplied."""
    left = load_model(ours, dtype=dtype, quantization=rows, ops=get_ops())
    right = load_model(theirs, dtype=dtype, ops=get_ops())
    tokens = prompt(left.config.vocab_size)
    logits, found = answer(left.decoder, tokens)
    expected, wanted = answer(right.decoder, tokens)
    assert expected.std() > 0.01, "the toy says the same everywhere: the test would be blind"
    assert torch.equal(logits, expected)
    assert found == wanted


@pytest.mark.parametrize("name", TOYS)
def test_f32_file_equals_its_checkpoint(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "hf", TOYS[name])
    convert(folder, tmp_path / "model.gguf")
    compare(tmp_path / "model.gguf", folder)


KEPT = {"Q8_0": "int8-weight-only", "Q4_0": "int4-weight-only"}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("model", ["llama", "qwen2", "mixtral"])
def test_kept_codes_equal_their_dequantised_checkpoint(
    kind: str, model: str, tmp_path: Path
) -> None:
    settings = {**WIDE_LLAMA, **(TOYS[model] if model == "mixtral" else {})}
    folder = save(model, tmp_path / "hf", {**settings, "hidden_size": 256, "head_dim": 64})
    twin = convert(folder, tmp_path / "model.gguf", kind)
    compare(tmp_path / "model.gguf", twin, rows=KEPT[kind])


@pytest.mark.parametrize("kind", KEPT)
def test_kept_codes_run_with_int8_rows_and_stay_small(kind: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "hf", WIDE_LLAMA)
    twin = convert(folder, tmp_path / "model.gguf", kind)
    model = load_model(tmp_path / "model.gguf", ops=get_ops())
    plain = load_model(twin, dtype="float32", ops=get_ops())
    assert model.quantization == f"int{kind[1]}-g32"
    assert model.weight_bytes < plain.weight_bytes * (0.3 if kind == "Q8_0" else 0.17)
    tokens = prompt(model.config.vocab_size)
    found, expected = (answer(loaded.decoder, tokens)[0] for loaded in (model, plain))
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_quantised_file_equals_its_dequantised_checkpoint(kind: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "hf", WIDE_LLAMA)
    twin = convert(folder, tmp_path / "model.gguf", kind)
    compare(tmp_path / "model.gguf", twin)
    compare(tmp_path / "model.gguf", twin, dtype="bfloat16")


def test_quantised_experts_equal_their_dequantised_checkpoint(tmp_path: Path) -> None:
    settings = {**WIDE_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
    folder = save("mixtral", tmp_path / "hf", settings)
    twin = convert(folder, tmp_path / "model.gguf", "Q6_K")
    compare(tmp_path / "model.gguf", twin)


def test_auto_precision_loses_nothing(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "hf", WIDE_LLAMA)
    for kind, dtype in (("BF16", "bfloat16"), ("F16", "float32"), ("Q8_0", "float32")):
        convert(folder, tmp_path / f"{kind}.gguf", kind)
        loaded = load_model(tmp_path / f"{kind}.gguf", ops=get_ops())
        assert loaded.dtype == dtype
        assert loaded.weight_format == f"gguf/{kind}"


def test_tokenizer_survives_loading_the_model(tmp_path: Path) -> None:
    """The weights' map is closed after loading; the tokenizer must not need it."""
    backend = toy_tokenizers.byte_level()
    vocab = backend.get_vocab_size()
    folder = save("llama", tmp_path / "hf", {**TOYS["llama"], "vocab_size": vocab})
    convert(folder, tmp_path / "model.gguf", tokenizer=backend)
    loaded = load_model(tmp_path / "model.gguf", ops=get_ops())
    tokenizer = loaded.tokenizer_source.tokenizer
    assert tokenizer.vocab_size == loaded.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


def test_bundled_model_as_gguf_answers_the_same(tmp_path: Path) -> None:
    """The whole way: configuration, weights, tokenizer and template from one file."""
    folder = locate("bundled")
    specials = {"eos_token_id": 2, "padding_token_id": 3}
    original = Tokenizer.open(folder)
    convert(
        folder,
        tmp_path / "model.gguf",
        "BF16",
        Backend.from_file(str(folder / "tokenizer.json")),
        pre="qwen2",
        specials=specials,
        template=original.chat_template(),
    )
    rebuilt = Tokenizer.open(tmp_path / "model.gguf")
    assert rebuilt.eos_ids == original.eos_ids
    assert rebuilt.special_ids == original.special_ids
    messages = [{"role": "user", "content": "Write a line about the sea, and 123 🙂."}]
    answers = [
        LLM(model=str(model), max_sequences=2).chat(messages, SamplingParams(max_tokens=24, seed=5))
        for model in (folder, tmp_path / "model.gguf")
    ]
    (ours,), (theirs,) = answers
    assert ours.prompt_token_ids == theirs.prompt_token_ids
    assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
    assert ours.outputs[0].text == theirs.outputs[0].text != ""
