"""Quantize a model layer by layer, each layer seeing what the quantized ones before it make.

All of the calibration text goes through one layer at a time: once to note what its matrices
are given, once more after it is quantized, to make the next layer's input. So only one
layer's statistics exist at any moment, and errors of early layers are known to later ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coppice.kernels.formats import Format, Quantized
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.models.plan import DecoderPlan, LayerPlan, Stack, bias_of
from coppice.models.quantized.layer import (
    Method,
    Site,
    attached,
    awq_scale,
    quantize_sites,
    record,
    replaced,
)
from coppice.models.source import TensorSource

PAGE_SIZE = 32


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        matrices: tensors and codes of each matrix.
        floats: float tensors that changed (norms, biases), by checkpoint name.
    """

    matrices: list[tuple[Stack, Quantized]]
    floats: dict[str, Tensor]


class Calibration:
    """Runs a method over a decoder's layers, replacing them as it goes.

    Args:
        decoder: float weights; its layers are quantized in place.
        plan: of the same checkpoint.
        source: read for biases.
        fmt: what the layers become.
        method: ``"gptq"``, ``"awq"``, or ``"rtn"`` (which then minds input energy).
        scale_dtype: type the scales will be stored in.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: DecoderPlan,
        source: TensorSource,
        *,
        fmt: Format,
        method: Method,
        scale_dtype: torch.dtype,
    ) -> None:
        self._decoder = decoder
        self._plan = plan
        self._source = source
        self._format = fmt
        self._method: Method = method
        self._scale_dtype = scale_dtype

    def run(self, texts: Sequence[Sequence[int]]) -> Iterator[QuantizedLayer]:
        """Quantize all layers, first to last, calibrating on token sequences."""
        batch = _Batch(self._decoder, texts)
        for index, plan in enumerate(self._plan.layers):
            yield self._layer(index, plan, batch)

    @torch.inference_mode()
    def _layer(self, index: int, plan: LayerPlan, batch: _Batch) -> QuantizedLayer:
        weights, config = self._decoder.weights.layers[index], self._decoder.config
        recorded = record(weights, plan)
        batch.run(index, keep=False)
        places = list(attached(weights, plan))
        sites = [
            Site(owner, attribute, stack, linear.dequant(), self._bias(stack), linear.statistics)
            for (owner, attribute, stack), linear in zip(places, recorded, strict=True)
        ]
        if self._method == "awq":
            awq_scale(config, weights, sites, self._format)
        quantize_sites(sites, self._format, self._method, self._scale_dtype)
        for site, linear in zip(sites, recorded, strict=True):
            setattr(site.owner, site.attribute, replaced(site, self._format, linear))
        batch.run(index, keep=True)
        floats: dict[str, Tensor] = {}
        if self._method == "awq":
            for role in ("before_attention", "before_mlp"):
                norm = getattr(weights, role)
                if norm is not None:
                    floats[plan.norms[role][0]] = norm - config.norm_offset
            for site in sites:
                floats.update(_split_bias(site))
        matrices = [(site.stack, site.quantized) for site in sites if site.quantized is not None]
        return QuantizedLayer(matrices, floats)

    def _bias(self, stack: Stack) -> Tensor | None:
        if not stack.bias:
            return None
        return torch.cat(
            [self._source.read(bias_of(name), torch.float32) for name, _ in stack.parts]
        )


def _split_bias(site: Site) -> Iterator[tuple[str, Tensor]]:
    if site.bias is not None:
        sizes = [rows for _, rows in site.stack.parts]
        parts = torch.split(site.bias, sizes)
        for (name, _), part in zip(site.stack.parts, parts, strict=True):
            yield bias_of(name), part


class _Batch:
    """The texts between two layers: their hidden states, and pages for one of them."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, texts: Sequence[Sequence[int]]) -> None:
        longest = max(len(text) for text in texts)
        layout = decoder.kv_layout(PAGE_SIZE)
        pages = list(range(-(-longest // PAGE_SIZE)))
        self._decoder = decoder
        self._k = torch.zeros(layout.shape(len(pages)), dtype=layout.dtype, device=layout.device)
        self._v = torch.zeros_like(self._k)
        self._rows = [Rows.chunk(list(text), pages) for text in texts]
        self._states = [decoder.embed(rows) for rows in self._rows]

    def run(self, index: int, *, keep: bool) -> None:
        """Pass all texts through layer ``index``; keep its outputs, or drop them."""
        for i, rows in enumerate(self._rows):
            out = self._decoder.run_layer(
                index, self._states[i], rows, k_pages=self._k, v_pages=self._v
            )
            if keep:
                self._states[i] = out
