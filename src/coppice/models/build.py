"""From a checkpoint's tensors to a decoder's packed weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.interface import Ops
from coppice.models.config import ModelConfig
from coppice.models.decoder import DecoderWeights, LayerWeights
from coppice.models.mlp import FeedForward, GatedMLP
from coppice.models.moe import ExpertMixture
from coppice.models.plan import DecoderPlan, LayerPlan, Stack, bias_of, check_plan, make_plan
from coppice.models.source import TensorSource
from coppice.weights import BF16, Format, Linear, Part

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read), counted at the packed precision."""


def build_weights(
    config: ModelConfig,
    source: TensorSource,
    ops: Ops,
    *,
    format: Format,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Check the whole checkpoint against ``config``, then read and pack it.

    Peak memory is the packed weights plus one source tensor.

    Raises:
        CheckpointError: tensors are missing, misshaped, unexpected or contradict ``config``.
    """
    plan = make_plan(config, set(source.names()))
    check_plan(plan, source)
    _check_tie(plan, source)
    return _Builder(config, source, ops, format, _Meter(plan, format, progress)).decoder(plan)


def _check_tie(plan: DecoderPlan, source: TensorSource) -> None:
    """A tied checkpoint may repeat its embedding as head, but not hold another head."""
    spare = [name for name in source.names() if name.endswith("lm_head.weight")]
    if plan.head is not None or not spare:
        return
    embedding = plan.embedding.name
    if source.shape(spare[0]) != source.shape(embedding) or not torch.equal(
        source.read(spare[0], torch.float32), source.read(embedding, torch.float32)
    ):
        raise CheckpointError(
            f"config.json ties the output to the embedding, but {spare[0]!r} differs from it; "
            "set 'tie_word_embeddings' to false, or remove the tensor."
        )


class _Meter:
    """Counts bytes as tensors are consumed."""

    def __init__(self, plan: DecoderPlan, format: Format, progress: Progress | None) -> None:
        self._report = progress
        self._item = 2 if format == BF16 else 4
        self._done = 0
        self._total = self._item * sum(
            torch.Size(shape).numel() for shape in plan.tensors().values()
        )

    def add(self, tensor: Tensor) -> None:
        self._done += tensor.numel() * self._item
        if self._report is not None:
            self._report(self._done, self._total)


class _Builder:
    """Reads what a plan asks for."""

    def __init__(
        self, config: ModelConfig, source: TensorSource, ops: Ops, format: Format, meter: _Meter
    ) -> None:
        self._config = config
        self._source = source
        self._ops = ops
        self._format = format
        self._dtype = format.dtype if not format.quantized else torch.float32
        self._meter = meter
        self._whole: tuple[str, Tensor] | None = None

    def decoder(self, plan: DecoderPlan) -> DecoderWeights:
        embedding = self._linear(plan.embedding)
        layers = [self._layer(layer) for layer in plan.layers]
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            norm=self._norm(*plan.norm),
            head=embedding if plan.head is None else self._linear(plan.head),
        )

    def _layer(self, plan: LayerPlan) -> LayerWeights:
        norms = {role: self._norm(*norm) for role, norm in plan.norms.items()}
        return LayerWeights(
            qkv=self._linear(plan.qkv),
            output=self._linear(plan.output),
            mlp=self._mlp(plan),
            before_attention=norms.get("before_attention"),
            after_attention=norms.get("after_attention"),
            before_mlp=norms.get("before_mlp"),
            after_mlp=norms.get("after_mlp"),
            q_norm=norms.get("q"),
            k_norm=norms.get("k"),
        )

    def _mlp(self, plan: LayerPlan) -> FeedForward:
        activation, spec = self._config.activation, self._config.experts
        # Matrices in two passes: a tensor that holds all experts is then read once.
        firsts = [self._linear(gate_up) for gate_up, _ in plan.mlps]
        seconds = [self._linear(down) for _, down in plan.mlps]
        self._whole = None
        pairs = zip(firsts, seconds, strict=True)
        mlps = [GatedMLP(first, second, self._ops, activation) for first, second in pairs]
        if plan.router is None or spec is None:
            return mlps[0]
        return ExpertMixture(self._linear(plan.router), mlps, spec)

    def _norm(self, name: str, size: int) -> Tensor:
        weight = self._source.read(name, torch.float32).reshape(size)
        self._meter.add(weight)
        self._source.release(name)
        return weight.to(self._ops.device) + self._config.norm_offset

    def _linear(self, stack: Stack) -> Linear:
        return Linear.pack(
            self._ops,
            stack.name,
            self._parts(stack),
            shape=(stack.out_features, stack.in_features),
            format=self._format,
            bias=stack.bias,
        )

    def _parts(self, stack: Stack) -> Iterator[Part]:
        for name, _ in stack.parts:
            bias = None
            if stack.bias:
                bias = self._source.read(bias_of(name), torch.float32)
                self._meter.add(bias)
            weight = self._read(name) if stack.expert is None else self._slice(name, stack.expert)
            self._meter.add(weight)
            yield Part(weight, bias)
            del weight
            self._source.release(name)

    def _read(self, name: str) -> Tensor:
        return self._source.read(name, self._dtype)

    def _slice(self, name: str, index: int) -> Tensor:
        """One expert's matrix of a tensor for all, which is kept until the next one."""
        if self._whole is None or self._whole[0] != name:
            self._whole = None
            self._whole = (name, self._read(name))
        return self._whole[1][index]
