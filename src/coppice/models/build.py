"""From a checkpoint's tensors to a decoder's packed weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.interface import Ops
from coppice.models.config import ModelConfig
from coppice.models.mlp import FeedForward, GatedMLP
from coppice.models.moe import ExpertMixture
from coppice.models.packs import Packs
from coppice.models.plan import DecoderPlan, LayerPlan, Stack, bias_of, check_plan, plan_of
from coppice.models.source import TensorSource
from coppice.models.weights import DecoderWeights, LayerWeights
from coppice.weights import BF16, Format, Linear, Part, Quantized
from coppice.weights.names import Scheme, with_activations
from coppice.weights.rounding import round_to_nearest

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes to read), counted at the packed precision."""


def build_weights(
    config: ModelConfig,
    source: TensorSource,
    ops: Ops,
    *,
    format: Format,
    scheme: Scheme | None = None,
    packs: Packs | None = None,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Check the whole checkpoint against ``config``, then read and pack it.

    Peak memory is the packed weights plus one source tensor.

    Args:
        config: what the checkpoint is compared with.
        source: its tensors.
        ops: who packs them.
        format: a float format, for matrices that are stored as floats.
        scheme: quantize matrices to this; those stored as codes of no more bits keep them.
        packs: matrices packed before are taken from there, new ones are left there.
        progress: told how far it is.

    Raises:
        CheckpointError: tensors are missing, misshaped, unexpected or contradict ``config``.
    """
    plan = plan_of(config, source)
    check_plan(plan, source)
    packs = packs or Packs()
    if not packs.complete:  # it was looked at when they were made
        _check_tie(plan, source)
    formats = _Formats(source, format, scheme)
    meter = _Meter(plan, format, progress)
    return _Builder(config, source, ops, formats=formats, packs=packs, meter=meter).decoder(plan)


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

    def add(self, count: int) -> None:
        self._done += count * self._item
        if self._report is not None:
            self._report(self._done, self._total)


class _Formats:
    """Decides how each matrix is kept."""

    def __init__(self, source: TensorSource, floats: Format, scheme: Scheme | None) -> None:
        self._source = source
        self.floats = floats
        self.layers = None if scheme is None else scheme.layers
        self.embedding = None if scheme is None else scheme.embedding

    def choose(self, stack: Stack, wanted: Format | None) -> Format:
        """``wanted`` where the checkpoint has floats or more bits, its own codes otherwise."""
        stored = self.stored(stack)
        if stored is None or (wanted is not None and wanted.bits < stored.bits):
            return wanted or self.floats
        return stored if wanted is None else with_activations(stored, wanted.activations)

    def stored(self, stack: Stack) -> Format | None:
        """The one format all parts are stored in; None for floats, or where they differ."""
        found = {self._source.stored_format(name) for name, _ in stack.parts}
        return None if stack.expert is not None or len(found) > 1 else found.pop()


class _Builder:
    """Reads what a plan asks for."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        ops: Ops,
        *,
        formats: _Formats,
        packs: Packs,
        meter: _Meter,
    ) -> None:
        self._config = config
        self._source = source
        self._ops = ops
        self._formats = formats
        self._packs = packs
        self._meter = meter
        self._native = source.native_dtype()
        self._whole: tuple[str, Tensor] | None = None

    def decoder(self, plan: DecoderPlan) -> DecoderWeights:
        wanted = self._formats.embedding
        embedding = self._linear(plan.embedding, wanted)
        layers = [self._layer(layer) for layer in plan.layers]
        return DecoderWeights(
            embedding=embedding,
            layers=layers,
            norm=self._norm(*plan.norm),
            head=embedding if plan.head is None else self._linear(plan.head, wanted),
        )

    def _layer(self, plan: LayerPlan) -> LayerWeights:
        norms = {role: self._norm(*norm) for role, norm in plan.norms.items()}
        wanted = self._formats.layers
        return LayerWeights(
            qkv=self._linear(plan.qkv, wanted),
            output=self._linear(plan.output, wanted),
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
        wanted = self._formats.layers
        firsts = [self._linear(gate_up, wanted) for gate_up, _ in plan.mlps]
        seconds = [self._linear(down, wanted) for _, down in plan.mlps]
        self._whole = None
        pairs = zip(firsts, seconds, strict=True)
        mlps = [GatedMLP(first, second, self._ops, activation) for first, second in pairs]
        if plan.router is None or spec is None:
            return mlps[0]
        router = self._pack(plan.router, self._formats.floats)
        return ExpertMixture(router, mlps, spec)

    def _norm(self, name: str, size: int) -> Tensor:
        weight = self._source.read(name, torch.float32).reshape(size)
        self._meter.add(weight.numel())
        self._source.release(name)
        return weight.to(self._ops.device) + self._config.norm_offset

    def _linear(self, stack: Stack, wanted: Format | None) -> Linear:
        return self._pack(stack, self._formats.choose(stack, wanted))

    def _pack(self, stack: Stack, format: Format) -> Linear:
        shape = (stack.out_features, stack.in_features)
        name = stack.name if stack.expert is None else f"{stack.name}[{stack.expert}]"
        kept = self._packs.find(name, format)
        if kept is not None:
            self._meter.add(stack.out_features * stack.in_features)
            return Linear.from_tensors(self._ops, stack.name, shape, format, kept)
        parts = self._parts(stack, format)
        linear = Linear.pack(
            self._ops, stack.name, parts, shape=shape, format=format, bias=stack.bias
        )
        self._packs.keep(name, linear)
        return linear

    def _parts(self, stack: Stack, format: Format) -> Iterator[Part]:
        stored = self._formats.stored(stack)
        for name, rows in stack.parts:
            bias = None
            if stack.bias:
                bias = self._source.read(bias_of(name), torch.float32)
                self._meter.add(rows)
            if stored is not None and stored.bits == format.bits:
                weight, order = self._source.read_codes(name)
                yield Part(weight, bias, order)
                del weight
            else:
                yield Part(self._floats(stack, name, format), bias)
            self._meter.add(rows * stack.in_features)
            self._source.release(name)

    def _floats(self, stack: Stack, name: str, format: Format) -> Tensor | Quantized:
        """One part read as floats, and rounded to nearest where the format has codes."""
        dtype = self._native if format.quantized else format.dtype
        if stack.expert is None:
            weight = self._source.read(name, dtype)
        else:
            weight = self._slice(name, stack.expert, dtype)
        return round_to_nearest(weight, format, name=name) if format.quantized else weight

    def _slice(self, name: str, index: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix of a tensor for all, which is kept until the next one."""
        if self._whole is None or self._whole[0] != name:
            self._whole = None
            self._whole = (name, self._source.read(name, dtype))
        return self._whole[1][index]
