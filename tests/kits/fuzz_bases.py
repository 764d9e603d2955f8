"""What `tests.kits.fuzz` mutates: sound files of every stored format, small and large.

Each is loaded as a starting server loads it: tensors are read, dequantized and packed by the
kernels, tokenizers encode, decode and render. The large files hold weights that are loaded in
the precision they are stored in. Stored types that are expanded to floats by design stand in
the small files only, where all they can become is a fraction of the fixed allowance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from coppice.cache.marks import Marks
from coppice.cache.segment import SegmentForm
from coppice.cache.segments import FOLDER, SegmentStore
from coppice.engine.loading import tokenizer_of
from coppice.errors import CheckpointError
from coppice.kernels import get_ops, native_available, set_num_threads
from coppice.kernels.interface import Ops
from coppice.models.gguf.reader import GGUFReader
from coppice.models.load import LoadedModel, check_vocabulary, load_model
from coppice.models.template import prepare_messages, render_chat
from coppice.models.tokenizer import Tokenizer
from coppice.weights import Linear
from tests.kits import toy_tokenizers
from tests.kits.adapter import make_adapter
from tests.kits.fake_model import TEMPLATE, write_fake_model
from tests.kits.gguf_writer import convert
from tests.kits.quantized_writer import write as write_quantized
from tools.make_model import SHAPES, tensor_shapes, write_shard

TEXT = "The <s> quick 🙂 fox, abba\n"
MESSAGES = [{"role": "user", "content": TEXT}]
TINY: dict[str, Any] = {
    **SHAPES["toy-llama"],
    "vocab_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}
LARGE = {**TINY, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 128}
"""Six matrices of a MiB each, and small ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A sound file.

    Attributes:
        path: where it lies, and its mutations will.
        load: what a start makes of it; raises `CoppiceError` where it refuses.
        head: its first bytes, where most decisions are made.
        beside: bytes of the other large files that ``load`` reads.
        mapped: it is mapped, so that its own pages count as resident.
        large: it is so large that a fixed allowance for its loader is small beside it.
    """

    path: Path
    load: Callable[[], object]
    head: int = 2048
    beside: int = 0
    mapped: bool = False
    large: bool = False


@cache
def kernels() -> Ops:
    """The operators that pack; every matrix gets memory of its own.

    An arena for many would hide from a sanitizer where one of them ends.
    """
    if native_available():
        from coppice.kernels.native import ops as native

        native.ARENA_BYTES = 0
    found = get_ops()
    set_num_threads(1)
    return found


def load_weights(path: Path, *, unpack: bool, **options: Any) -> LoadedModel:
    """Build a decoder; with ``unpack`` every matrix is multiplied, gathered and unpacked, too."""
    loaded = load_model(path, ops=kernels(), **options)
    if unpack:
        for linear in linears(loaded):
            rows, width = linear.shape
            linear(torch.ones(3, width))
            linear.gather(torch.tensor([0, rows - 1]))
            linear.dequant()
    return loaded


def linears(loaded: LoadedModel) -> Iterator[Linear]:
    """All matrices of a model."""
    weights = loaded.decoder.weights
    yield from (weights.embedding, weights.head)
    for layer in weights.layers:
        yield from (layer.qkv, layer.output, *layer.mlp.linears())


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """There and back, whole and token by token, then a prompt by its chat template."""
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    stream = tokenizer.text_stream()
    for id_ in ids:
        stream.push(tokenizer.piece(id_) or "")
        tokenizer.token_bytes(id_)
    stream.finish()
    assert tokenizer.fingerprint
    template = tokenizer.chat_template()
    if template is not None:
        messages = prepare_messages(template, MESSAGES)
        text = render_chat(template, messages, special_tokens=tokenizer.special_tokens)
        tokenizer.encode(text, add_special_tokens=False)


def load_gguf(path: Path, *, unpack: bool) -> None:
    """Weights, tokenizer and whether they belong together."""
    loaded = load_weights(path, unpack=unpack)
    tokenizer = tokenizer_of(loaded)
    check_vocabulary(loaded.config, tokenizer.vocab_size)
    use_tokenizer(tokenizer)


def write_model(folder: Path, config: dict[str, Any], dtype: str = "float32") -> Path:
    """A checkpoint folder of this configuration."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", tensor_shapes(config), dtype, seed=0)
    return folder


def of_folder(folder: Path, *, unpack: bool, large: bool = False, **options: Any) -> Base:
    """The weights of a checkpoint folder."""
    path = folder / "model.safetensors"
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    load = partial(load_weights, folder, unpack=unpack, **options)
    return Base(path=path, load=load, head=head, large=large)


def safetensors_bases(folder: Path, unpack: bool) -> Iterator[Base]:
    """Floats of both widths, floats rounded as they are read, and each layout of codes."""
    floats = write_model(folder / "f32", TINY)
    yield of_folder(floats, unpack=unpack)
    yield of_folder(write_model(folder / "bf16", TINY, "bfloat16"), unpack=unpack)
    rounded = write_model(folder / "int8", {**TINY, "tie_word_embeddings": True})
    yield of_folder(rounded, unpack=unpack, quantization="int8")
    mixture = {**SHAPES["toy-mixtral"], **{k: TINY[k] for k in TINY if k != "model_type"}}
    yield of_folder(write_model(folder / "experts", mixture), unpack=unpack)
    for name, layout, options in (
        ("gptq", "gptq", {"act_order": True}),
        ("gptq-affine", "gptq_v2", {"symmetric": False}),
        ("gptq-8", "gptq", {"bits": 8}),
        ("awq", "awq", {"symmetric": False}),
        ("packed", "pack", {"symmetric": False, "act_order": True}),
        ("packed-8", "pack", {"bits": 8, "group": -1, "rows": True}),
        ("int", "int", {"bits": 8, "group": -1, "rows": True}),
    ):
        write_quantized(floats, folder / name, layout, **options)
        yield of_folder(folder / name, unpack=unpack)
    yield of_folder(write_model(folder / "large", LARGE), unpack=unpack, large=True)


WIDE: dict[str, Any] = {  # K-quants need rows of whole blocks of 256
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 32,
    "head_dim": 16,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
EXPANDED = {
    "token_embd": "Q6_K",
    "attn_q.": "Q4_K",
    "attn_k.": "Q5_K",
    "attn_v.": "Q4_1",
    "attn_output": "Q5_0",
    "ffn_gate": "F16",
    "ffn_up": "BF16",
    "ffn_down": "Q5_1",
}
KEPT = {
    "token_embd": "Q8_0",
    "attn_q.": "Q8_0",
    "attn_k.": "Q8_0",
    "attn_v.": "Q8_0",
    "attn_output": "Q4_0",
    "ffn_": "Q4_0",
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def gguf_bases(folder: Path, unpack: bool) -> Iterator[Base]:
    """Every type of block, several architectures, both kinds of tokenizer, a large file."""
    small = {k: TINY[k] for k in TINY if k != "model_type"}
    windowed = {"sliding_window": 48, "rope_theta": 1e4}
    cases: tuple[tuple[str, dict[str, Any], str | dict[str, str], bool], ...] = (
        ("expanded", WIDE, EXPANDED, True),
        ("kept", {**TINY, "rope_scaling": None}, KEPT, False),
        ("gemma", {**SHAPES["toy-gemma3"], **small, **windowed}, "F32", False),
        ("experts", {**SHAPES["toy-qwen3-moe"], **small, "num_experts": 4}, "Q8_0", True),
        ("phi", {**SHAPES["toy-phi3"], **small, "rope_scaling": LONGROPE,
                 "original_max_position_embeddings": 1024}, "Q4_0", True),
        ("large", {**LARGE, "num_hidden_layers": 3}, {"attn": "Q8_0", "ffn": "Q8_0"}, True),
    )  # fmt: skip
    for name, config, kinds, byte_level in cases:
        path = folder / f"{name}.gguf"
        tokenizer = byte_level_toy() if byte_level else scored_toy()
        specials = {"eos_token_id": 17} if byte_level else {"eos_token_id": 1, "bos_token_id": 1}
        source = write_model(folder / f"{name}-floats", config)
        if name == "phi":
            fuse(source / "model.safetensors")
        convert(source, path, kinds, tokenizer, specials=specials, template=TEMPLATE)
        shutil.rmtree(folder / f"{name}-twin")
        reader = GGUFReader(path)
        head = min(info.start for info in reader.tensors.values())
        reader.close()
        load = partial(load_gguf, path, unpack=unpack)
        yield Base(path=path, load=load, head=head, mapped=True, large=name == "large")


def fuse(path: Path) -> None:
    """One matrix for queries, keys and values, and one for gate and up, as Phi-3 has them."""
    tensors = load_file(path)
    for fused, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        found = [tensors.pop(f"model.layers.0.{part}.weight") for part in parts]
        tensors[f"model.layers.0.{fused}.weight"] = torch.cat(found)
    save_file(tensors, path)


def byte_level_toy() -> tokenizers.Tokenizer:
    """A few letters in GPT-2's alphabet, merges and two special tokens."""
    vocab = {token: i for i, token in enumerate([*"abcdefghijklmĠ", "ab", "ba", "abba"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("a", "b"), ("b", "a"), ("ab", "ba")], byte_fallback=False)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend


def scored_toy() -> tokenizers.Tokenizer:
    """A few pieces as SentencePiece would have them, one byte among them."""
    pieces = ["<unk>", "<s>", "<0x0A>", *"▁abcdefghij", "ab", "ba", "▁a"]
    merges = [("a", "b"), ("b", "a"), ("▁", "a")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>"])
    return backend


def tokenizer_bases(folder: Path, unpack: bool) -> Iterator[Base]:
    """``tokenizer.json`` of each kind and the configuration beside it, with its template."""
    kinds = (
        toy_tokenizers.byte_level(280),
        toy_tokenizers.byte_fallback(),
        toy_tokenizers.metaspace(),
        toy_tokenizers.words(),
    )
    for number, backend in enumerate(kinds):
        made = folder / str(number)
        toy_tokenizers.save_folder(backend, made, bos_token="<s>", chat_template=TEMPLATE)
        yield of_tokenizer(made / "tokenizer.json")
    yield of_tokenizer(write_fake_model(folder / "bytes") / "tokenizer.json")
    settings = write_fake_model(folder / "settings") / "tokenizer_config.json"
    yield of_tokenizer(settings)
    large = toy_tokenizers.save_folder(wordy(), folder / "large", chat_template=TEMPLATE)
    yield of_tokenizer(large / "tokenizer.json", large=True)


def wordy() -> tokenizers.Tokenizer:
    """Sixty thousand tokens in as many merges; a file of some MiB."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][:60_000]
    vocab = {token: i for i, token in enumerate([*letters, *map("".join, pairs)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def of_tokenizer(path: Path, *, large: bool = False) -> Base:
    """A file of a tokenizer's folder."""
    return Base(
        path=path, load=lambda: use_tokenizer(Tokenizer.from_folder(path.parent)), large=large
    )


def adapter_bases(folder: Path, unpack: bool, *, settings: bool = False) -> Iterator[Base]:
    """Factors, or the settings beside them, with the model they are added to."""
    cases: tuple[tuple[str, dict[str, Any], int, dict[str, Any]], ...] = (
        ("small", TINY, 2, {}),
        ("rounded", TINY, 4, {"quantization": "int8"}),
        ("large", {**LARGE, "num_hidden_layers": 2}, 64, {}),
    )
    for name, config, rank, options in cases:
        base = write_model(folder / f"{name}-base", config)
        made = make_adapter(folder / name, base, rank=rank, alpha=4.0, use_rslora=rank == 4)
        factors = of_folder(base, unpack=unpack, adapter=made, **options)
        path = made / ("adapter_config.json" if settings else "adapter_model.safetensors")
        beside = sum(file.stat().st_size for place in (base, made) for file in place.iterdir())
        yield Base(
            path=path,
            load=factors.load,
            beside=beside - path.stat().st_size,
            large=name == "large",
        )


def segment_bases(folder: Path, unpack: bool) -> Iterator[Base]:
    """Six KV pages on disk, of 256 bytes each and of a MiB each."""
    for name, page_bytes in (("small", 256), ("large", 1 << 20)):
        form = SegmentForm(b"f" * 32, page_size=16, page_bytes=page_bytes, slots=8)
        marks = Marks(b"s" * 32, b"fuzz")
        keys = [marks.child(marks.root("fuzz"), [i] * 16) for i in range(6)]
        (folder / name).mkdir()
        open_ = partial(SegmentStore, folder / name, form, bound_bytes=64 << 20, max_age_s=1e9)
        store = open_().open()
        for number, key in enumerate(keys):
            store.write(key, np.full(page_bytes, number, np.uint8))
        store.close()
        (path,) = (folder / name / FOLDER).glob("*.kv")
        load = partial(read_segment, open_, keys)
        yield Base(path=path, load=load, head=form.pages_at, large=name == "large")


def read_segment(open_: Callable[[], SegmentStore], keys: list[Any]) -> None:
    """Ask for every page: each comes as it was written or not at all."""
    store, damaged = open_().open(), False
    try:
        asked = list(keys)
        while asked:
            found = store.read(asked)
            for key, page in zip(asked, found, strict=False):
                damaged |= page is None
                if page is not None and not (page == key.tokens[0]).all():
                    raise AssertionError("a damaged page was believed")
            asked = asked[len(found) :]
    finally:
        store.close()
    if damaged:
        raise CheckpointError("Some pages are damaged.")


KINDS: dict[str, Callable[[Path, bool], Iterator[Base]]] = {
    "safetensors": safetensors_bases,
    "gguf": gguf_bases,
    "tokenizer": tokenizer_bases,
    "adapter": adapter_bases,
    "adapter settings": partial(adapter_bases, settings=True),
    "kv-segment": segment_bases,
}
