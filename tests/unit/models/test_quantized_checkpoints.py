"""Quantized checkpoints that contradict themselves are refused, by tensor name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice.errors import CheckpointError, ConfigError, UnsupportedModelError
from coppice.kernels import get_ops
from coppice.models.load import load_model
from tests.kits.quantized_writer import write
from tools.make_model import make_model

LAYER = "model.layers.1.mlp.down_proj."
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    make_model("toy-llama", tmp_path / "toy", dtype="float32", tokenizer=False)
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


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def make(floats: Path, layout: str, **options: Any) -> Path:
    out = floats.parent / "q"
    write(floats, out, layout, **{"group": 32, **options})
    return out


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "hqq", "mxfp4", 7, None])
def test_unknown_methods_are_named(floats: Path, method: Any) -> None:
    folder = make(floats, "awq", symmetric=False)
    configure(folder, lambda c: c.update(quant_method=method, bits=None))
    if method is None:
        configure(folder, lambda c: c.pop("bits"))
    refused(folder, f"quantized with {method!r}.*gptq, awq", UnsupportedModelError)


@pytest.mark.parametrize(
    ("layout", "setting", "match"),
    [
        ("gptq", {"bits": 3}, r"'bits' to 3; supported: 4 and 8"),
        ("gptq", {"bits": 8, "sym": False}, r"'bits' to 8; supported: 4"),
        ("gptq", {"checkpoint_format": "marlin"}, r"'checkpoint_format' to 'marlin'"),
        ("awq", {"version": "gemv"}, r"version 'gemv'.*'gemm'"),
        ("awq", {"bits": 8}, r"'bits' to 8"),
        ("pack", {"format": "float-quantized"}, r"'format' to 'float-quantized'"),
        ("pack", {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme"),
    ],
)
def test_settings_that_are_not_built_are_named(
    floats: Path, layout: str, setting: dict[str, Any], match: str
) -> None:
    folder = make(floats, layout, symmetric=layout != "awq")
    configure(folder, lambda c: c.update(setting))
    refused(folder, match, UnsupportedModelError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_bits": 2}, r"'num_bits' to 2"),
        ({"type": "float"}, r"'type' to 'float'"),
        ({"strategy": "block"}, r"strategy 'block'"),
    ],
)
def test_weight_schemes_that_are_not_built_are_named(
    floats: Path, change: dict[str, Any], match: str
) -> None:
    folder = make(floats, "pack")
    configure(folder, lambda c: c["config_groups"]["group_0"]["weights"].update(change))
    refused(folder, match, UnsupportedModelError)


def test_static_activations_are_not_taken_for_dynamic_ones(floats: Path) -> None:
    folder = make(floats, "int", bits=8, group=-1, rows=True)
    rows = {"num_bits": 8, "type": "int", "dynamic": False}
    configure(folder, lambda c: c["config_groups"]["group_0"].update(input_activations=rows))
    refused(folder, "activations.*'dynamic': False", UnsupportedModelError)


def test_modules_no_group_describes(floats: Path) -> None:
    folder = make(floats, "pack")
    only = ["re:.*self_attn.*"]
    configure(folder, lambda c: c["config_groups"]["group_0"].update(targets=only))
    refused(folder, r"No group.*mlp\.")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", ".*.*.*.*.*x", "(x{9}){9}"])
def test_patterns_that_could_take_forever_are_refused(floats: Path, pattern: str) -> None:
    folder = make(floats, "pack")
    targets = [f"re:{pattern}"]
    configure(folder, lambda c: c["config_groups"]["group_0"].update(targets=targets))
    refused(folder, "invalid or repeats too much")


@pytest.mark.parametrize("group", [48, 0, -2, 1 << 30])
def test_groups_that_do_not_divide_the_width(floats: Path, group: int) -> None:
    folder = make(floats, "gptq")
    configure(folder, lambda c: c.update(group_size=group))
    refused(folder, r"group")


def test_groups_smaller_than_any_kernels(floats: Path) -> None:
    folder = make(floats, "gptq", group=16)
    refused(folder, r"qweight.*groups of 16", UnsupportedModelError)


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack"])
def test_a_group_size_of_other_tensors(floats: Path, layout: str) -> None:
    folder = make(floats, layout, symmetric=layout != "awq")

    def change(config: dict[str, Any]) -> None:
        for found in (config, config.get("config_groups", {}).get("group_0", {}).get("weights")):
            if found and "group_size" in found:
                found["group_size"] = 64

    configure(folder, change)
    refused(folder, r"Tensor 'model\.layers\.0.*(scale|zeros).*do they belong together")


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack"])
@pytest.mark.parametrize("fault", ["missing", "short", "type"])
def test_tensors_that_contradict_the_settings(floats: Path, layout: str, fault: str) -> None:
    folder = make(floats, layout, symmetric=layout != "awq")
    name = LAYER + ("weight_scale" if layout == "pack" else "scales")

    def change(tensors: Tensors) -> None:
        if fault == "missing":
            del tensors[name]
        elif fault == "short":
            tensors[name] = tensors[name][:-1].contiguous()
        else:
            tensors[name] = tensors[name].to(torch.int32)

    edit(folder, change)
    refused(folder, rf"Tensor '{name}'")


@pytest.mark.parametrize("layout", ["gptq", "awq", "pack"])
def test_scales_that_are_not_finite(floats: Path, layout: str) -> None:
    folder = make(floats, layout, symmetric=layout != "awq")
    name = LAYER + ("weight_scale" if layout == "pack" else "scales")
    edit(folder, lambda t: t[name].view(-1)[3].fill_(float("nan")))
    refused(folder, rf"'{name}' holds scales that are not finite")


def test_symmetric_weights_with_other_zero_points(floats: Path) -> None:
    folder = make(floats, "gptq")
    edit(folder, lambda t: t[f"{LAYER}qzeros"].view(-1)[0].fill_(0x12345678))
    refused(folder, rf"'{LAYER}qzeros' holds zero points other than 8.*'sym'")


@pytest.mark.parametrize("value", [0, 99, -1])
def test_inputs_unevenly_over_groups(floats: Path, value: int) -> None:
    folder = make(floats, "gptq")
    edit(folder, lambda t: t[f"{LAYER}g_idx"][5:9].fill_(value))
    if value == 0:
        edit(folder, lambda t: t[f"{LAYER}g_idx"][40:44].fill_(value))
    refused(folder, rf"{LAYER}g_idx does not put exactly 32")


def test_a_shape_the_words_do_not_hold(floats: Path) -> None:
    folder = make(floats, "pack")
    edit(folder, lambda t: t[f"{LAYER}weight_shape"].copy_(torch.tensor([64, 1 << 40])))
    refused(folder, rf"{LAYER}weight_packed")


def test_floats_that_claim_to_be_quantized(floats: Path) -> None:
    path = floats / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path.write_text(json.dumps(config))
    refused(floats, "no tensor is; remove 'quantization_config'")


def test_codes_without_settings(floats: Path) -> None:
    folder = make(floats, "gptq")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    refused(folder, "missing, first 'model.layers.0")


def test_a_matrix_stored_twice(floats: Path) -> None:
    folder = make(floats, "gptq")
    edit(folder, lambda t: t.update({f"{LAYER}weight": torch.zeros(64, 128)}))
    refused(folder, rf"'{LAYER}weight' is stored both")


def test_a_name_of_other_weights(floats: Path) -> None:
    folder = make(floats, "gptq")
    path = folder / "config.json"
    for name in ("int8", "int5"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "coppice_quantization": name}))
        refused(folder, rf"'coppice_quantization' to '{name}'.*4 bits")


def test_widths_no_group_divides_say_what_to_choose(floats: Path) -> None:
    """128 does not divide 64 inputs; int8 needs no groups."""
    refused(floats, r"64 inputs do not divide into the groups of 128",
            quantization="int4-g128")  # fmt: skip
    assert load(floats, quantization="int8").quantization == "int8"


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32", "int4-weight-only"])
def test_rounding_while_loading(floats: Path, name: str) -> None:
    plain, model = load(floats), load(floats, quantization=name)
    assert model.quantization is not None and model.quantization.startswith(
        name.split("-", maxsplit=1)[0]
    )
    assert model.decoder.weights.embedding.format.bits == 8
    assert model.fingerprint != plain.fingerprint
    assert model.weight_bytes < plain.weight_bytes / (3 if name == "int8" else 3.2)
    for ours, theirs in zip(
        model.decoder.weights.layers, plain.decoder.weights.layers, strict=True
    ):
        w, found = theirs.qkv.dequant(), ours.qkv.dequant()
        relative = float((found - w).norm() / w.norm())
        assert 1e-4 < relative < (0.01 if name == "int8" else 0.15)


def test_a_router_stays_float(tmp_path: Path) -> None:
    make_model("toy-mixtral", tmp_path / "moe", dtype="float32", tokenizer=False)
    model = load(tmp_path / "moe", quantization="int8")
    router, *experts = model.decoder.weights.layers[0].mlp.linears()
    assert router.format.name == "f32"
    assert {linear.format.name for linear in experts} == {"int8"}


def test_unknown_names_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "'int7' is unknown; choose from int8", ConfigError,
            quantization="int7")  # fmt: skip
