"""GGUF files: exact dequantisation, checked headers, rebuilt tokenizers, hostile bytes."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants as reference
from tokenizers import Tokenizer as Backend
from tokenizers import models

from coppice.errors import CheckpointError, CoppiceError, UnsupportedModelError
from coppice.models.gguf import open_gguf
from coppice.models.gguf.architectures import band_factors
from coppice.models.gguf.file import open_tokenizer
from coppice.models.gguf.pretokenizers import PRETOKENIZERS
from coppice.models.gguf.quants import TYPES, dequantize
from coppice.models.gguf.reader import GGUFReader
from coppice.models.gguf.tokenizer import pre_tokenizer, read_tokenizer
from coppice.models.load import load_model
from coppice.models.tokenizer import Tokenizer, TokenizerFacts
from tests.kits import toy_tokenizers
from tests.kits.gguf_writer import llama3_factors, write_tokenizer

TEXTS = [*toy_tokenizers.TEXT, "<|im_start|>user\n<tool_call> a<tool_call>", "", " ", "  x", "<s>"]


# --- dequantisation -------------------------------------------------------------------------


@pytest.mark.parametrize("code", TYPES)
def test_dequantisation_is_bit_equal_to_the_reference(code):
    quant = TYPES[code]
    assert gguf.GGML_QUANT_SIZES[Kind(code)] == (quant.block, quant.block_bytes)
    raw = np.random.default_rng(code).integers(0, 256, (300, quant.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales may be infinite or NaN: still equal
        ours = dequantize(raw.reshape(-1), quant.name)
        theirs = reference.dequantize(raw, Kind(code)).reshape(-1)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


# --- the container --------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def tensor(name: str, dims: list[int], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def file(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    body = head + b"".join(keys) + b"".join(tensors)
    return body + b"\0" * (-len(body) % alignment) + data


def read(tmp_path: Path, content: bytes) -> GGUFReader:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return GGUFReader(path)


U32, STRING, ARRAY = 4, 8, 9


def test_reads_every_kind_of_value(tmp_path):
    keys = [entry(f"n{code}", code, struct.pack("<" + fmt, 1)) for code, fmt in NUMBERS.items()]
    keys += [
        entry("flag", 7, b"\x01"),
        entry("s", STRING, text("é")),
        entry("ints", ARRAY, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        entry("strings", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
    ]
    reader = read(tmp_path, file(keys, [tensor("w", [2, 3])], np.arange(6, dtype="<f4").tobytes()))
    assert [reader.metadata[f"n{code}"] for code in NUMBERS] == [1] * len(NUMBERS)
    assert reader.metadata["flag"] is True
    assert reader.metadata["s"] == "é"
    assert reader.metadata["ints"].tolist() == [1, -2, 3]
    assert reader.metadata["strings"].decode() == ["a", ""]
    assert reader.tensors["w"].shape == (3, 2)
    values = dequantize(reader.tensor_bytes(reader.tensors["w"]), "F32")
    assert values.tolist() == [0, 1, 2, 3, 4, 5]
    del values
    reader.close()
    with pytest.raises(CheckpointError, match="closed"):
        reader.tensor_bytes(reader.tensors["w"])


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
HUGE = 2**64 - 1
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "magic": b"GGML" + file()[4:],
    "version": file(version=1),
    "big_endian": file(version=3 << 24),
    "cut_header": file()[:10],
    "tensor_count": file(counts=(HUGE, 0)),
    "key_count": file(counts=(0, HUGE)),
    "missing_keys": file(counts=(0, 9)),
    "missing_tensors": file(counts=(9, 0)),
    "key_length": file([struct.pack("<Q", HUGE) + b"k"]),
    "key_not_text": file([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", U32, 1)]),
    "key_twice": file([entry("k", U32, struct.pack("<I", 1))] * 2),
    "value_type": file([entry("k", 13, b"")]),
    "value_length": file([entry("k", STRING, struct.pack("<Q", HUGE))]),
    "array_length": file([entry("k", ARRAY, struct.pack("<IQ", U32, HUGE))]),
    "array_longer_than_file": file([entry("k", ARRAY, struct.pack("<IQ", U32, 1 << 20))]),
    "array_type": file([entry("k", ARRAY, struct.pack("<IQ", 99, 1))]),
    "array_nested": file([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]),
    "strings_longer_than_file": file([entry("k", ARRAY, struct.pack("<IQ", STRING, 1 << 20))]),
    "alignment_zero": file([entry("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment_odd": file([entry("general.alignment", U32, struct.pack("<I", 33))]),
    "alignment_text": file([entry("general.alignment", STRING, text("32"))]),
    "rank_zero": file([], [tensor("w", [])], b"\0" * 64),
    "rank_five": file([], [tensor("w", [1] * 5)], b"\0" * 64),
    "rank_huge": file([], [text("w") + struct.pack("<I", 2**32 - 1)], b"\0" * 64),
    "dim_zero": file([], [tensor("w", [0, 4])], b"\0" * 64),
    "dims_overflow": file([], [tensor("w", [2**62, 4])], b"\0" * 64),
    "dims_overflow_to_zero": file([], [tensor("w", [2**32, 2**32])], b"\0" * 64),
    "dims_overflow_to_small": file([], [tensor("w", [2**32, 2**32, 2**32, 4])], b"\0" * 64),
    "tensor_beyond_file": file([], [tensor("w", [17])], b"\0" * 64),
    "offset_beyond_file": file([], [tensor("w", [1], offset=64)], b"\0" * 64),
    "offset_huge": file([], [tensor("w", [1], offset=2**64 - 32)], b"\0" * 64),
    "offset_unaligned": file([], [tensor("w", [1], offset=4)], b"\0" * 64),
    "block_remainder": file([], [tensor("w", [33], code=8)], b"\0" * 128),
    "type_unknown": file([], [tensor("w", [1], code=10)], b"\0" * 64),
    "type_removed": file([], [tensor("w", [1], code=4)], b"\0" * 64),
    "overlap": file([], [tensor("a", [9]), tensor("b", [1], offset=32)], b"\0" * 64),
    "name_twice": file([], [tensor("a", [1]), tensor("a", [1], offset=32)], b"\0" * 64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_containers_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError):
        read(tmp_path, HOSTILE[name])


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            GGUFReader(path)


# --- models ---------------------------------------------------------------------------------

LLAMA = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
}


def model(
    path: Path, arch: str = "llama", *, keys: dict[str, Any] | None = None, tokenizer: bool = True
) -> Path:
    """A whole one-layer file."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**LLAMA, **(keys or {})}.items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    backend = toy_tokenizers.byte_level(300)
    if tokenizer:
        specials = {"bos_token_id": 0, "eos_token_id": 2}
        write_tokenizer(writer, backend, specials=specials, template="{{ messages[0].content }}")
    rng = np.random.default_rng(1)
    shapes = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    shapes |= {"ffn_gate": 32, "ffn_up": 32, "ffn_down": 32}
    writer.add_tensor("token_embd.weight", rng.random((301, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    for name, rows in shapes.items():
        raw = reference.quantize(rng.random((rows, 32), np.float32), Kind.Q8_0)
        writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_opens_a_whole_model(tmp_path):
    opened = open_gguf(model(tmp_path / "m.gguf"))
    assert opened.config["model_type"] == "llama"
    assert opened.config["rms_norm_eps"] == 1e-6
    assert opened.config["eos_token_id"] == 2
    assert opened.config["tie_word_embeddings"] is True
    assert opened.tokenizer.chat_template() == "{{ messages[0].content }}"
    assert opened.tokenizer.eos_ids == (2, 0)
    source = opened.source
    names = set(source.names())
    assert source.shape("model.layers.0.self_attn.k_proj.weight") == (16, 32)
    assert source.format == "gguf/F32"
    assert len(source.fingerprint()) == 64
    for name in names:
        source.release(name)
    source.close()
    with pytest.raises(CheckpointError, match="closed"):
        source.fingerprint()


@pytest.mark.parametrize(
    ("arch", "keys", "error"),
    [
        ("mamba", {}, UnsupportedModelError),
        ("llama", {"embedding_length": None}, CheckpointError),
        ("llama", {"attention.head_count": [2, 4]}, UnsupportedModelError),
        ("llama", {"attention.value_length": 8}, UnsupportedModelError),
        ("llama", {"rope.dimension_count": 4}, UnsupportedModelError),
        ("qwen3moe", {}, CheckpointError),
        ("olmo2", {}, UnsupportedModelError),
        ("phi3", {}, UnsupportedModelError),
        ("phi3", {"embedding_length": 1, "rope.dimension_count": 4}, UnsupportedModelError),
    ],
)
def test_unfit_models_are_refused(tmp_path, arch, keys, error):
    with pytest.raises(error):
        open_gguf(model(tmp_path / "m.gguf", arch, keys=keys))


def test_layers_without_number_are_refused_before_they_are_listed(tmp_path):
    keys = {"block_count": 2**31, "attention.sliding_window": 8}
    path = model(tmp_path / "m.gguf", "gemma3", keys=keys)
    with pytest.raises(CheckpointError, match="claims 2147483648 layers"):
        open_gguf(path)


def test_no_heads_are_refused(tmp_path):
    keys = {"block_count": 46, "attention.head_count": 0}  # what tells Gemma 2's largest
    path = model(tmp_path / "m.gguf", "gemma2", keys=keys)
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize(
    ("base", "count", "match"),
    [(-1e4, 8, "freq_base is -10000.0"), (1e4, 70_000, "too large for rope factors")],
)
def test_odd_rope_factors_are_refused(tmp_path, base, count, match):
    keys = [
        entry("general.architecture", STRING, text("llama")),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6)),
        entry("llama.rope.freq_base", 6, struct.pack("<f", base)),
        *(entry(f"llama.{key}", U32, struct.pack("<I", value)) for key, value in LLAMA.items()),
    ]
    tensors = [tensor("token_embd.weight", [32, 2]), tensor("rope_freqs.weight", [count], 0, 256)]
    path = tmp_path / "m.gguf"
    path.write_bytes(file(keys, tensors, b"\x3f" * (256 + 4 * count)))
    with pytest.raises(CheckpointError, match=match):
        open_gguf(path)


def test_uniform_arrays_count_as_one_number(tmp_path):
    opened = open_gguf(model(tmp_path / "m.gguf", keys={"attention.head_count": [2, 2]}))
    assert opened.config["num_attention_heads"] == 2


def test_llama3_bands_match_the_converter():
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = llama3_factors({**rope, "original_max_position_embeddings": 8192}, 5e5, 128)
    ours = band_factors(5e5, 64, (8.0, 1.0, 4.0, 8192))
    assert np.allclose(ours, theirs, rtol=1e-12)
    assert len(set(np.round(ours, 3))) > 5


def test_mutated_files_open_or_are_refused(tmp_path):
    original = model(tmp_path / "m.gguf").read_bytes()
    header = original.index(b"blk.0.ffn_down") + 40
    rng = random.Random(3)
    path = tmp_path / "mutated.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(header) if rng.random() < 0.9 else rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.randrange(1, 64)]
                case 2:
                    data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, HUGE]))
                case _:
                    data = data[: max(at, 1)]
                    header = min(header, len(original))
            if len(data) < header:
                break
        path.write_bytes(bytes(data))
        try:
            opened = open_gguf(path)
            for name in opened.source.names():
                opened.source.read(name, torch.float32)
            opened.close()
            opened.tokenizer.encode("the quick 🙂")
        except CoppiceError as error:
            assert isinstance(error, CheckpointError)
            refused += 1
    assert refused > 100


# --- tokenizers -----------------------------------------------------------------------------


def tokenizer_file(path: Path, backend: Backend, **options: Any) -> Tokenizer:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("add_bos_token", "add_space_prefix"):
        if key in options:
            writer.add_bool(f"tokenizer.ggml.{key}", options.pop(key))
    write_tokenizer(writer, backend, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_tokenizer(path)


def test_byte_level_tokenizer_equals_its_original(tmp_path):
    backend = toy_tokenizers.byte_level()
    ours = tokenizer_file(tmp_path / "t.gguf", backend, specials={"eos_token_id": 2})
    original = Tokenizer(backend, TokenizerFacts())
    assert ours.special_ids == original.special_ids
    assert ours.vocab_size == original.vocab_size
    assert ours.eos_ids == (2, 0)
    for sample in TEXTS:
        assert ours.encode(sample) == original.encode(sample)
        assert ours.decode(ours.encode(sample)) == sample


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_equals_its_original(tmp_path, prefix):
    backend = toy_tokenizers.byte_fallback(strip=prefix)
    specials = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    ours = tokenizer_file(tmp_path / "t.gguf", backend, specials=specials, add_space_prefix=prefix)
    original = Tokenizer(backend, TokenizerFacts(special_tokens={"bos_token": "<s>"}))
    for sample in TEXTS:
        assert ours.encode(sample) == original.encode(sample)
        ids = ours.encode(sample, add_special_tokens=False)
        assert ours.decode(ids) == original.decode(ids)


def test_bos_follows_the_file(tmp_path):
    specials = {"bos_token_id": 1}
    backend = toy_tokenizers.byte_fallback()
    default = tokenizer_file(tmp_path / "a.gguf", backend, specials=specials)
    without = tokenizer_file(tmp_path / "b.gguf", backend, specials=specials, add_bos_token=False)
    assert default.encode("the")[0] == 1
    assert 1 not in without.encode("the")


def test_scores_reproduce_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(toy_tokenizers.TEXT).split("\n") * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model_ = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    size = model_.vocab_size()
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model_.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([model_.get_score(i) for i in range(size)])
    kinds = [
        2 if model_.is_unknown(i) else 3 if model_.is_control(i) else 6 if model_.is_byte(i) else 1
        for i in range(size)
    ]
    writer.add_token_types(kinds)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = open_tokenizer(tmp_path / "t.gguf")
    for sample in [*toy_tokenizers.TEXT, "unseen wörds & 数字 123", "  two  spaces "]:
        assert ours.encode(sample) == model_.encode(sample)
        assert ours.decode(ours.encode(sample)) == model_.decode(model_.encode(sample))


SPLITS = {
    "gpt-2": ["I", "'ll", " pay", " 12345", "!", "\n\n ", " Don", "'", "T"],
    "smollm": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!", "\n\n ", " Don", "'", "T"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", "!\n\n", " ", " Don", "'T"],
    "qwen2": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", " ", " Don", "'T"],
    "gpt-4o": ["I'll", " pay", " ", "123", "45", "!\n\n", " ", " Don'T"],
    "tekken": ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", " ", " Don", "'T"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_pretokenizers_split_as_the_models_do(name):
    pieces = pre_tokenizer(PRETOKENIZERS[name]).pre_tokenize_str("I'll pay 12345!\n\n  Don'T")
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces] == SPLITS[name]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError),
        ({"tokenizer.ggml.pre": "novel"}, UnsupportedModelError),
        ({"tokenizer.ggml.pre": 3}, CheckpointError),
        ({"tokenizer.ggml.tokens": None}, CheckpointError),
        ({"tokenizer.ggml.merges": None}, CheckpointError),
        ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, CheckpointError),
        ({"tokenizer.ggml.eos_token_id": "2"}, CheckpointError),
        ({"tokenizer.ggml.add_bos_token": 1}, CheckpointError),
        ({"tokenizer.ggml.model": "llama"}, CheckpointError),
    ],
)
def test_unfit_tokenizers_are_refused(tmp_path, change, error):
    reader = GGUFReader(model(tmp_path / "m.gguf"))
    reader.metadata.update(change)
    with pytest.raises(error):
        read_tokenizer(reader)


def test_merge_into_a_missing_token_is_a_checkpoint_error(tmp_path):
    backend = toy_tokenizers.byte_level(300)
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(backend.get_vocab()))
    writer.add_token_merges(["Z Z"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="Z Z"):
        open_tokenizer(tmp_path / "t.gguf")


def test_pieces_that_split_in_too_many_ways_are_refused(tmp_path):
    """A few hundred pieces in a file of 130 kB that would make 130,000 merges."""
    pieces = ["<unk>", *("a" * length for length in range(1, 513))]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    with pytest.raises(CheckpointError, match="too many ways"):
        tokenizer_file(tmp_path / "t.gguf", backend)


def test_tokenizer_needs_no_torch(tmp_path):
    path = model(tmp_path / "m.gguf")
    code = (
        "import sys; from coppice.models.tokenizer import Tokenizer; "
        f"t = Tokenizer.open({str(path)!r}); assert t.encode('the'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
