"""Rounding: error bounds, clipping, hostile weights."""

from __future__ import annotations

import typing

import pytest
import torch

from coppice.engine.config import Quantization
from coppice.errors import CheckpointError, ConfigError
from coppice.kernels.formats import Format
from coppice.weights.names import SCHEMES, integer_format, scheme
from coppice.weights.rounding import code_range, round_to_nearest

FORMATS = [
    integer_format(8, 0, activations="int8"),
    integer_format(8, 32, activations="int8"),
    *(
        integer_format(4, group, zero_points=zeros, activations="float")
        for group in (32, 64, 128)
        for zeros in (False, True)
    ),
]
BY_NAME = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def weight(n: int = 24, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(w: torch.Tensor, fmt: Format, **options: torch.Tensor) -> float:
    found = round_to_nearest(w, fmt, **options).dequant()
    return float((found - w).square().sum() / w.square().sum())


@BY_NAME
def test_codes_and_scales_have_the_formats_shape_and_range(fmt: Format) -> None:
    rows = round_to_nearest(weight(), fmt)
    low, high = code_range(fmt)
    assert rows.codes.shape == (24, 256) and rows.codes.dtype == torch.int8
    assert rows.scales.shape == (24, fmt.num_groups(256))
    assert int(rows.codes.min()) >= low and int(rows.codes.max()) <= high
    assert (rows.zeros is not None) == fmt.zero_points


@BY_NAME
def test_scales_survive_the_type_they_are_stored_in(fmt: Format) -> None:
    scales = round_to_nearest(weight(), fmt).scales
    assert torch.equal(scales, scales.to(fmt.scale_dtype).float())


def test_eight_bits_lose_at_most_half_a_step() -> None:
    w = weight()
    rows = round_to_nearest(w, FORMATS[0])
    assert torch.all((rows.dequant() - w).abs() <= rows.scales * 0.5001)
    assert relative_error(w, FORMATS[0]) < 1e-4


def test_clipping_beats_the_whole_range_at_four_bits() -> None:
    """A Gaussian group's extreme is worth clipping; a search that never did would show here."""
    w = weight(64, 128)
    for group in (32, 64, 128):
        fmt = integer_format(4, group, activations="float")
        grouped = w.view(64, -1, group)
        step = grouped.abs().amax(-1, keepdim=True) / 7
        whole = (grouped / step).round() * step
        plain = float((whole - grouped).square().sum() / w.square().sum())
        assert relative_error(w, fmt) < 0.85 * plain


def test_smaller_groups_and_zero_points_help() -> None:
    w = weight(64) + 0.01
    errors = {fmt.name: relative_error(w, fmt) for fmt in FORMATS[2:]}
    for end in ("-weight-only", "-zp-weight-only"):
        sizes = [errors[f"int4-g{group}{end}"] for group in (32, 64, 128)]
        assert sizes == sorted(sizes)
    assert errors["int4-g64-zp-weight-only"] < errors["int4-g64-weight-only"]


def test_important_inputs_are_kept_better() -> None:
    w, fmt = weight(64, 64), integer_format(4, 64, activations="float")
    importance = torch.ones(64)
    importance[:8] = 1000.0
    plain = (round_to_nearest(w, fmt).dequant() - w)[:, :8].square().sum()
    weighted = (round_to_nearest(w, fmt, importance=importance).dequant() - w)[:, :8]
    assert weighted.square().sum() < 0.8 * plain


@BY_NAME
@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(3, 128),
        torch.full((3, 128), -0.7),
        torch.full((3, 128), 100.0),
        torch.full((3, 128), 1e-40),
        torch.nn.functional.pad(torch.full((3, 1), 55.0), (0, 127)),
    ],
    ids=["zero", "constant", "large", "denormal", "one"],
)
def test_hostile_rows_stay_finite_and_close(fmt: Format, rows: torch.Tensor) -> None:
    found = round_to_nearest(rows, fmt).dequant()
    assert torch.isfinite(found).all()
    assert (found - rows).abs().max() <= 0.05 * rows.abs().max() + 1e-30


@BY_NAME
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(fmt: Format, bad: float) -> None:
    w = weight()
    w[3, 77] = bad
    with pytest.raises(CheckpointError, match=r"blk\.q.*undefined"):
        round_to_nearest(w, fmt, name="blk.q")


def test_groups_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"down.*groups of 64.*96 inputs; choose int8"):
        round_to_nearest(weight(4, 96), integer_format(4, 64, activations="float"), name="down")


def test_many_rows_are_rounded_like_few() -> None:
    w = weight(300, 128)
    fmt = integer_format(4, 32, activations="float")
    whole = round_to_nearest(w, fmt)
    part = round_to_nearest(w[250:], fmt)
    assert torch.equal(whole.codes[250:], part.codes)
    assert torch.equal(whole.scales[250:], part.scales)


def test_every_name_has_its_formats_and_no_other_is_taken() -> None:
    for name, found in SCHEMES.items():
        assert scheme(name).name == name
        assert found.embedding.bits == 8
        assert (found.layers.activations == "float") == name.endswith("-weight-only")
    assert {"none", *SCHEMES} == set(typing.get_args(Quantization)), "settings list them too"
    with pytest.raises(ConfigError, match=r"'int3'.*int8.*int4"):
        scheme("int3")
