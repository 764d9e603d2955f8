"""A LoRA adapter is added exactly, or refused with a reason; nothing stays open."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice.engine.llm import LLM
from coppice.engine.request import SamplingParams
from coppice.errors import CheckpointError
from coppice.kernels import get_ops
from coppice.models.load import LoadedModel, load_model
from coppice.models.quantized.convert import quantize_folder
from coppice.weights.names import scheme
from tests.kits.adapter import make_adapter
from tests.kits.models import SMALL
from tools.make_model import make_model

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_model("toy-llama", tmp_path / "toy", dtype="float32", tokenizer=False)
    return tmp_path / "toy"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, rank=4, alpha=8.0)


def merged_by_hand(base: Path, adapter: Path, folder: Path, scale: float) -> Path:
    """The base with the products added in float64."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in factors if name.endswith("lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        target = stem.removeprefix("base_model.model.") + ".weight"
        change = factors[f"{stem}.lora_B.weight"].double() @ factors[name].double()
        weights[target] = (weights[target].double() + scale * change).float()
    save_file(weights, folder / "model.safetensors")
    return folder


def load(folder: Path, adapter: Path | None = None, **options: Any) -> LoadedModel:
    return load_model(folder, adapter=adapter, ops=get_ops(prefer="reference"), **options)


def matrix(loaded: LoadedModel) -> torch.Tensor:
    """The first layer's Q, K and V matrices."""
    return loaded.decoder.weights.layers[0].qkv.dequant()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8.0 / 4), (True, 8.0 / 2)])
def test_it_is_added_with_its_scale(
    base: Path, tmp_path: Path, *, rslora: bool, scale: float
) -> None:
    adapter = make_adapter(tmp_path / "a", base, rank=4, alpha=8.0, use_rslora=rslora)
    by_hand = matrix(load(merged_by_hand(base, adapter, tmp_path / "merged", scale)))
    assert torch.allclose(matrix(load(base, adapter)), by_hand, rtol=0, atol=1e-6)
    assert (matrix(load(base)) - by_hand).abs().max() > 0.01


def test_it_can_be_rounded_as_it_is_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merged_by_hand(base, adapter, tmp_path / "merged", 2.0)
    found, wanted = (
        matrix(load(folder, added, quantization="int8"))
        for folder, added in ((base, adapter), (merged, None))
    )
    assert torch.allclose(found, wanted, rtol=0, atol=1e-3)


def test_it_is_part_of_the_fingerprint(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", base, rank=4, alpha=8.0, seed=1)
    prints = {load(base, each).fingerprint for each in (None, adapter, other)}
    assert len(prints) == 3


def test_an_engine_answers_with_it(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", Path(SMALL), rank=4, alpha=64.0)

    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def answer(added: str | None) -> list[int]:
        llm = LLM(SMALL, adapter=added, kv_cache_mib=8)
        return llm.generate("once", params)[0].outputs[0].token_ids

    assert answer(str(adapter)) != answer(None)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(edit: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        edit(found)
        save_file(found, path)

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def edit(found: Tensors) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return tensors(edit)


def wider(found: Tensors) -> None:
    name = next(name for name in found if name.endswith("lora_A.weight"))
    found[name] = torch.cat([found[name], found[name]], dim=1)


def without_a_partner(found: Tensors) -> None:
    found.pop(next(name for name in found if name.endswith("lora_B.weight")))


def absent(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (absent("adapter_config.json"), "Cannot read"),
        (absent("adapter_model.safetensors"), "Cannot read"),
        (config(peft_type="IA3"), "peft_type"),
        (config(use_dora=True), "use_dora"),
        (config(bias="all"), "bias"),
        (config(modules_to_save=["lm_head"]), "modules_to_save"),
        (config(rank_pattern={"q_proj": 8}), "rank_pattern"),
        (config(r=0), "'r'"),
        (config(r=10**400), "'r'"),
        (config(r=5), "rank 5"),
        (config(lora_alpha="x"), "lora_alpha"),
        (config(lora_alpha=float("nan")), "lora_alpha"),
        (renamed("layers.0", "layers.7"), "belongs to another model"),
        (renamed("lora_A.weight", "lora_C.weight"), "pairs of factors"),
        (tensors(wider), "belongs to another model"),
        (tensors(without_a_partner), "pairs of factors"),
        (tensors(dict.clear), "no factors"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Path, adapter: Path, change: Callable[[Path], None], match: str
) -> None:
    change(adapter)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=match):
        load(base, adapter)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_model_of_integers_takes_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    make_model("toy-llama", tmp_path / "float", dtype="float32")
    quantize_folder(tmp_path / "float", tmp_path / "int8", scheme("int8"))
    with pytest.raises(CheckpointError, match="stored as integers"):
        load(tmp_path / "int8", adapter)
