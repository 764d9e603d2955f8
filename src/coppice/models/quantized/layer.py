"""One decoder layer's matrices on their way from floats to codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from coppice.kernels.formats import Format, Quantized
from coppice.models.config import ModelConfig
from coppice.models.mlp import GatedMLP
from coppice.models.moe import ExpertMixture
from coppice.models.plan import LayerPlan, Stack
from coppice.models.quantized.statistics import InputStatistics, RecordedLinear
from coppice.models.weights import LayerWeights
from coppice.weights import Linear, Part
from coppice.weights.awq import search_scales
from coppice.weights.gptq import GPTQ
from coppice.weights.rounding import round_to_nearest

Method = Literal["rtn", "gptq", "awq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "awq")


@dataclass(slots=True)
class Site:
    """A matrix of a layer: where it sits, and the checkpoint tensors it is made of.

    Attributes:
        stack: its tensors.
        weight: ``[N, K]`` float32; scaled in place by AWQ.
        bias: ``[N]`` float32, if it has one.
        importance: ``[K]`` input energy for rounding, after any scaling.
        quantized: set at the end.
    """

    owner: object
    attribute: str
    stack: Stack
    weight: Tensor
    bias: Tensor | None
    statistics: InputStatistics
    importance: Tensor = field(init=False)
    quantized: Quantized | None = None

    def __post_init__(self) -> None:
        self.importance = self.statistics.hessian.diagonal().clone()

    def scale_inputs(self, scales: Tensor) -> None:
        """Multiply columns by ``scales [K]``; whoever makes the input divides by them."""
        self.weight *= scales
        self.importance /= scales.square()

    def divide_outputs(self, scales: Tensor, first: int) -> None:
        """Divide output features ``first ..`` by ``scales``."""
        self.weight[first : first + len(scales)] /= scales.unsqueeze(1)
        if self.bias is not None:
            self.bias[first : first + len(scales)] /= scales


def attached(weights: LayerWeights, plan: LayerPlan) -> Iterator[tuple[object, str, Stack]]:
    """Every quantizable matrix of a layer: its owner, its attribute there and its tensors."""
    yield weights, "qkv", plan.qkv
    yield weights, "output", plan.output
    mlp = weights.mlp
    pairs = mlp.experts if isinstance(mlp, ExpertMixture) else [mlp]
    for pair, (gate_up, down) in zip(pairs, plan.mlps, strict=True):
        assert isinstance(pair, GatedMLP), "every feed-forward is gated"
        yield pair, "gate_up", gate_up
        yield pair, "down", down


def record(weights: LayerWeights, plan: LayerPlan) -> list[RecordedLinear]:
    """Make every matrix note its inputs from now on; in the order of `attached`."""
    recorded = []
    for owner, attribute, _ in attached(weights, plan):
        recorded.append(RecordedLinear(getattr(owner, attribute)))
        setattr(owner, attribute, recorded[-1])
    return recorded


def awq_scale(config: ModelConfig, layer: LayerWeights, sites: list[Site], fmt: Format) -> None:
    """Scale the sites' inputs where something before them can absorb the division.

    Changes norms of ``layer`` and the sites' weights; what the layer computes stays the same.
    Left as they are: an output matrix whose value heads serve several query heads, and the
    first matrices of a mixture, whose input the router reads too.
    """
    qkv, output = sites[0], sites[1]
    layer.before_attention = _absorb(layer.before_attention, qkv, fmt)
    if config.num_heads == config.num_kv_heads:
        first = 2 * config.num_heads * config.head_dim
        qkv.divide_outputs(_scaled(output, fmt), first)
    if len(sites) == 4:  # noqa: PLR2004 - a dense layer
        layer.before_mlp = _absorb(layer.before_mlp, sites[2], fmt)
    for gate_up, down in zip(sites[2::2], sites[3::2], strict=True):
        if down.statistics.count:
            gate_up.divide_outputs(_scaled(down, fmt), gate_up.weight.shape[0] // 2)


def _absorb(norm: Tensor | None, site: Site, fmt: Format) -> Tensor | None:
    """The norm before a site, divided by the site's new input scales."""
    return None if norm is None else norm / _scaled(site, fmt)


def _scaled(site: Site, fmt: Format) -> Tensor:
    """Find a site's input scales, apply them and return them."""
    statistics = site.statistics
    scales, _ = search_scales([site.weight], statistics.magnitude, statistics.hessian, fmt)
    site.scale_inputs(scales)
    return scales


def quantize_sites(
    sites: list[Site], fmt: Format, method: Method, scale_dtype: torch.dtype
) -> None:
    """Round every site's weight; an expert that saw no row is rounded to nearest."""
    for site in sites:
        seen = site.statistics.count > 0
        if method == "gptq" and seen:
            hessian = site.statistics.hessian
            site.quantized = GPTQ().quantize(
                site.weight, hessian, fmt, name=site.stack.name, scale_dtype=scale_dtype
            )
        else:
            site.quantized = round_to_nearest(
                site.weight,
                fmt,
                name=site.stack.name,
                importance=site.importance if seen else None,
                scale_dtype=scale_dtype,
            )


def replaced(site: Site, fmt: Format, like: Linear) -> Linear:
    """The quantized layer in place of ``like``."""
    assert site.quantized is not None, "quantize before replacing"
    return Linear.pack(
        like.ops,
        like.name,
        [Part(site.quantized, site.bias)],
        shape=like.shape,
        format=fmt,
        bias=site.bias is not None,
    )
