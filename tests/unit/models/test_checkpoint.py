"""Folders that are incomplete, contradictory or unsafe are refused; nothing stays open."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice.errors import CheckpointError, ConfigError, UnsupportedModelError
from coppice.kernels import get_ops
from coppice.models.load import check_vocabulary, load_model
from tools.make_model import SHAPES, make_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("toy-llama", tmp_path / "toy", dtype="float32", tokenizer=False)
    return tmp_path / "toy"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_model("toy-llama", tmp_path / "toy", dtype="float32", shards=3, tokenizer=False)
    return tmp_path / "toy"


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, ops=get_ops(prefer="reference"), **options)


def refused(
    folder: Path, match: str, error: type[ConfigError] = CheckpointError, **options: Any
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=match):
        load(folder, **options)
    assert len(os.listdir("/proc/self/fd")) == before


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("toy")])
def test_every_toy_shape_loads_and_reports_itself(tmp_path: Path, shape: str) -> None:
    size = make_model(shape, tmp_path, dtype="bfloat16", tokenizer=False)
    model = load(tmp_path)
    assert model.dtype == "bfloat16"
    assert model.num_params * 2 == size
    assert model.weight_format == "safetensors/bfloat16"
    # Norms and biases are kept in float32.
    assert size <= model.weight_bytes < size * 1.1


def test_generated_models_repeat(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model("toy-qwen2", tmp_path / name, seed=seed, tokenizer=False)
    a, b, c = (load(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_shards_and_single_file_agree(folder: Path, sharded: Path, tmp_path: Path) -> None:
    make_model("toy-llama", tmp_path / "one", dtype="float32", tokenizer=False)
    whole, parts = load(tmp_path / "one").decoder.weights, load(sharded).decoder.weights
    for ours, theirs in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(ours.qkv.dequant(), theirs.qkv.dequant())
    assert torch.equal(whole.head.dequant(), parts.head.dequant())


def test_precision_is_part_of_the_fingerprint(folder: Path) -> None:
    assert load(folder).fingerprint != load(folder, dtype="bfloat16").fingerprint


def test_progress_reaches_its_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == model.num_params * 4
    assert seen == sorted(seen)


def test_missing_tensor(folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.pop(name))
    refused(folder, rf"missing, first '{name}' of shape \[128, 64\]")


def test_misshaped_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(16, 64)}))
    refused(folder, rf"'{name}' has shape \[16, 64\] where config.json asks for \[32, 64\]")


def test_unexpected_tensor(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    )
    refused(folder, "no place in this model, first 'model.layers.0.self_attn.q_proj.bias'")


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(8)}))
    load(folder)


def test_config_contradicting_tensors(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=5))
    refused(folder, "model.layers.4")
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=3))
    refused(folder, "no place in this model, first 'model.layers.3")
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=4, vocab_size=600))
    refused(folder, r"has shape \[512, 64\] where config.json asks for \[600, 64\]")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 1024}, "asks for 1024 layers but the checkpoint has 39 tensors"),
        (
            {"model_type": "mixtral", "num_local_experts": 4096},
            "4 layers and 4 times 4096 experts but the checkpoint has 39 tensors",
        ),
    ],
    ids=["layers", "experts"],
)
def test_more_layers_and_experts_than_tensors_cost_nothing(
    folder: Path, change: dict[str, Any], match: str
) -> None:
    edit_json(folder / "config.json", lambda c: c.update(change))
    tracemalloc.start()
    try:
        refused(folder, match)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_tied_head_that_differs_from_the_embedding(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    refused(folder, "ties the output to the embedding, but 'lm_head.weight' differs")
    edit_tensors(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    weights = load(folder).decoder.weights
    assert weights.head is weights.embedding


def test_wrong_dtype(folder: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(64, dtype=torch.int32)}))
    refused(folder, "dtype I32", UnsupportedModelError)


def test_missing_shard(sharded: Path) -> None:
    next(sharded.glob("model-00002*")).unlink()
    refused(sharded, "'model-00002-of-00003.safetensors', which is not there")


def test_truncated_shard(sharded: Path) -> None:
    path = next(sharded.glob("model-00003*"))
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, "model-00003-of-00003.safetensors: tensor .* truncated")


@pytest.mark.parametrize(
    "file",
    [
        "../other.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "x.bin",
        7,
        None,
        "a\\b.safetensors",
        "a\0.safetensors",
        "",
    ],
)
def test_index_naming_other_places(sharded: Path, file: Any) -> None:
    (sharded.parent / "other.safetensors").write_bytes(b"")

    def point(index: dict[str, Any]) -> None:
        index["weight_map"]["model.norm.weight"] = file

    edit_json(sharded / INDEX, point)
    refused(sharded, "shards (end in|must lie in)")


def test_index_and_shards_disagree(sharded: Path) -> None:
    edit_json(
        sharded / INDEX,
        lambda c: c["weight_map"].update({"extra": "model-00001-of-00003.safetensors"}),
    )
    refused(sharded, "puts tensor 'extra' in")
    edit_json(
        sharded / INDEX, lambda c: [c["weight_map"].pop(n) for n in ("extra", "model.norm.weight")]
    )
    refused(sharded, "holds 'model.norm.weight', not in")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_bad_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "weight_map|JSON")


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 200_000, '{"model_type": 3}', "{}"])
def test_bad_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json")


def test_shards_may_be_links(sharded: Path) -> None:
    blobs = sharded.parent / "blobs"
    blobs.mkdir()
    for path in sharded.glob("*.safetensors"):
        path.rename(blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    load(sharded)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "can run code and are never opened; convert", UnsupportedModelError)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "There is no model at")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["toy-llama"]))
    refused(tmp_path, "holds neither")
    refused(tmp_path / "config.json", "name its folder")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="cannot be reached; connect"):
        load_model("owner/name")


@pytest.mark.parametrize("name", ["../x", "a/../b", "a/b/c", "a\0/b", "http://x/y", "a//b", "/a/b"])
def test_paths_are_not_hub_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointError):
        load_model(name)


def test_unknown_dtype_and_context(folder: Path) -> None:
    refused(folder, "use auto", ConfigError, dtype="int3")
    refused(folder, "serves 1 to 2048", ConfigError, max_context=4096)
    assert load(folder, max_context=100).decoder.max_context == 100


def test_tokenizer_of_another_model(folder: Path) -> None:
    config = load(folder).config
    check_vocabulary(config, 512)
    with pytest.raises(CheckpointError, match="513 ids but the model knows 512"):
        check_vocabulary(config, 513)


def test_end_tokens_come_from_both_files(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 0, 999_999]}))
    assert load(folder).config.eos_token_ids == (0, 3)
