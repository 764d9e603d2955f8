"""``coppice quantize``: what is written loads again as what was computed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from coppice.cli.app import run
from coppice.errors import CheckpointError, ConfigError
from coppice.kernels import get_ops
from coppice.kernels.rows import Rows
from coppice.models.load import LoadedModel, load_model
from coppice.models.quantized.convert import Sampling, quantize_folder
from coppice.models.quantized.layer import Method
from coppice.weights.names import scheme
from coppice.weights.rounding import round_to_nearest
from tests.kits.models import SMALL
from tools.make_model import make_model

TEXT = "The old house stood at the end of the lane, and nobody had lived there for years. " * 40
SAMPLING = Sampling(sequences=4, length=64)
NAMES = ["int8", "int8-weight-only", "int4", "int4-g32", "int4-g128-weight-only"]


def ops():
    return get_ops(prefer="reference")


def load(folder: Path | str) -> LoadedModel:
    return load_model(folder, ops=ops())


@pytest.mark.parametrize("name", NAMES)
def test_rounded_copy_is_the_model_rounded_while_loading(tmp_path: Path, name: str) -> None:
    quantize_folder(SMALL, tmp_path / "q", scheme(name))
    copy, plain = load(tmp_path / "q"), load(SMALL)
    wanted = scheme(name).layers
    assert copy.quantization == wanted.name
    assert copy.decoder.weights.embedding.format == scheme(name).embedding
    for ours, theirs in zip(copy.decoder.weights.layers, plain.decoder.weights.layers, strict=True):
        rows = round_to_nearest(theirs.output.dequant(), wanted, scale_dtype=torch.bfloat16)
        assert torch.equal(ours.output.dequant(), rows.dequant())
        assert torch.equal(ours.before_mlp, theirs.before_mlp)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_calibrated_copy_answers_like_the_model(tmp_path: Path, method: Method) -> None:
    quantize_folder(
        SMALL,
        tmp_path / "q",
        scheme("int4-g32-weight-only"),
        method=method,
        text=TEXT,
        sampling=SAMPLING,
        ops=ops(),
    )
    copy, plain = load(tmp_path / "q"), load(SMALL)
    tokens = list(range(100, 160))
    found, wanted = (logits(model, tokens) for model in (copy, plain))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    same = torch.equal(
        copy.decoder.weights.layers[0].before_attention,
        plain.decoder.weights.layers[0].before_attention,
    )
    assert same == (method != "awq"), "AWQ folds its scales into the norms, others do not"


def test_awq_scales_change_nothing_before_rounding(tmp_path: Path) -> None:
    """With eight bits in place of four, folding must be invisible."""
    quantize_folder(
        SMALL,
        tmp_path / "q",
        scheme("int8-weight-only"),
        method="awq",
        text=TEXT,
        sampling=SAMPLING,
        ops=ops(),
    )
    copy, plain = load(tmp_path / "q"), load(SMALL)
    tokens = list(range(100, 160))
    found, wanted = (logits(model, tokens) for model in (copy, plain))
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


@torch.inference_mode()
def logits(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    layout = model.decoder.kv_layout(32)
    shape = layout.shape(2)

    pages = SimpleNamespace(
        k=[torch.zeros(shape, dtype=layout.dtype) for _ in range(layout.num_layers)],
        v=[torch.zeros(shape, dtype=layout.dtype) for _ in range(layout.num_layers)],
    )
    return model.decoder.forward(Rows.chunk(tokens, [0, 1]), pages)


def test_layout_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    quantize_folder(SMALL, tmp_path / "q", scheme("int4-g32"))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["format"] == "pack-quantized"
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    base = "model.layers.0.mlp.down_proj.weight"
    assert base not in tensors
    assert tensors[f"{base}_packed"].shape == (128, 384 // 8)
    assert tensors[f"{base}_packed"].dtype == torch.int32
    assert tensors[f"{base}_scale"].shape == (128, 384 // 32)
    assert tensors[f"{base}_shape"].tolist() == [128, 384]
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert (tmp_path / "q" / "tokenizer.json").is_file()


def test_large_copies_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_folder(SMALL, tmp_path / "one", scheme("int8"))
    monkeypatch.setattr("coppice.models.quantized.folder.SHARD_BYTES", 300_000)
    quantize_folder(SMALL, tmp_path / "many", scheme("int8"))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = (load(tmp_path / name).decoder.weights for name in ("one", "many"))
    for ours, theirs in zip(one.layers, many.layers, strict=True):
        assert torch.equal(ours.qkv.dequant(), theirs.qkv.dequant())


def test_fused_experts_come_apart(tmp_path: Path) -> None:
    make_model("toy-mixtral", tmp_path / "moe", dtype="float32", tokenizer=False)
    quantize_folder(tmp_path / "moe", tmp_path / "q", scheme("int4-g32"))
    copy, direct = (
        load(tmp_path / "q"),
        load_model(tmp_path / "moe", ops=ops(), quantization="int4-g32"),
    )
    pairs = zip(
        copy.decoder.weights.layers[0].mlp.linears(),
        direct.decoder.weights.layers[0].mlp.linears(),
        strict=True,
    )
    for ours, theirs in pairs:
        assert torch.equal(ours.dequant(), theirs.dequant())


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    make_model("toy-llama", tmp_path / "toy", dtype="float32", tokenizer=False)
    with pytest.raises(CheckpointError, match="groups of 128"):
        quantize_folder(tmp_path / "toy", tmp_path / "q", scheme("int4-g128"))
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    quantize_folder(SMALL, tmp_path / "q", scheme("int8"))
    with pytest.raises(ConfigError, match="already exists"):
        quantize_folder(SMALL, tmp_path / "q", scheme("int8"))
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_folder(tmp_path / "q", tmp_path / "again", scheme("int8"))
    with pytest.raises(ConfigError, match=r"gptq calibrates on text: give --calibration FILE"):
        quantize_folder(SMALL, tmp_path / "g", scheme("int4"), method="gptq")
    with pytest.raises(ConfigError, match=r"has \d+ tokens, less than one sequence"):
        quantize_folder(SMALL, tmp_path / "g", scheme("int4"), method="awq", text="Too short.")
    assert not (tmp_path / "again").exists() and not (tmp_path / "g").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", SMALL, str(tmp_path / "q"), "--format", "int4-g32"]) == 0
    assert "int4-g32" in capsys.readouterr().err
    assert load(tmp_path / "q").quantization == "int4-g32"
    for arguments, words in (
        (["--format", "int5"], "'int5' is unknown"),
        (["--method", "magic"], "'magic' is unknown"),
        (["--calibration", str(tmp_path / "none.txt")], "Cannot read"),
    ):
        assert run(["quantize", SMALL, str(tmp_path / "other"), *arguments]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
