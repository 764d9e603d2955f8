"""Which checkpoint tensors a decoder is made of, decided and checked before any is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from coppice.errors import CheckpointError
from coppice.models.config import LayerSpec, ModelConfig
from coppice.models.fields import short
from coppice.models.source import TensorSource

_PREFIXES = {
    "model.": "lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "": "lm_head.weight",
}
"""Where checkpoints keep the decoder, and its output matrix."""

_OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""Parts of image-and-text checkpoints that text never passes through."""


_STACKED = ".experts.gate_up_proj"
"""How tensors that hold all experts of a layer end."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A linear layer made of checkpoint tensors stacked over output features.

    Attributes:
        name: how the layer is called in messages.
        parts: weight tensors and their output features, in order.
        in_features: input features of each part.
        bias: each part ``x.weight`` has an ``x.bias``.
        expert: the parts are slices ``tensor[expert]`` of ``expert_count`` matrices.
    """

    name: str
    parts: tuple[tuple[str, int], ...]
    in_features: int
    bias: bool = False
    expert: int | None = None
    expert_count: int = 0

    @property
    def out_features(self) -> int:
        """Output features of the whole stack."""
        return sum(rows for _, rows in self.parts)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors it needs."""
        for name, rows in self.parts:
            matrix = (rows, self.in_features)
            yield name, matrix if self.expert is None else (self.expert_count, *matrix)
            if self.bias:
                yield bias_of(name), (rows,)


def bias_of(weight: str) -> str:
    """``x.weight`` to ``x.bias``."""
    return weight.removesuffix("weight") + "bias"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's tensors.

    Attributes:
        norms: tensor name and size of each norm, by role.
        mlps: gate-and-up and down matrices, one pair, or one per expert.
        router: chooses among experts, where there are some.
    """

    norms: dict[str, tuple[str, int]]
    qkv: Stack
    output: Stack
    mlps: tuple[tuple[Stack, Stack], ...]
    router: Stack | None = None

    def stacks(self) -> Iterator[Stack]:
        """All linear layers."""
        yield from (self.qkv, self.output)
        if self.router is not None:
            yield self.router
        for pair in self.mlps:
            yield from pair


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """All tensors of a decoder; ``head`` is None where the embedding serves as it."""

    embedding: Stack
    norm: tuple[str, int]
    head: Stack | None
    layers: tuple[LayerPlan, ...] = field(default_factory=tuple)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor needed, with the shape it must have."""
        wanted = {self.norm[0]: (self.norm[1],), **dict(self.embedding.tensors())}
        if self.head is not None:
            wanted.update(self.head.tensors())
        for layer in self.layers:
            wanted.update((name, (size,)) for name, size in layer.norms.values())
            for stack in layer.stacks():
                wanted.update(stack.tensors())
        return wanted


def plan_of(config: ModelConfig, source: TensorSource) -> DecoderPlan:
    """`make_plan` for a checkpoint, after a look at whether it can be as large as it says.

    Raises:
        CheckpointError: it has fewer tensors than layers and experts, or no embedding.
    """
    names = set(source.names())
    count = 0 if config.experts is None else config.experts.count
    stacked = sum(name.endswith(_STACKED) for name in names)
    apart = max(sum(layer.experts for layer in config.layers) - stacked, 0)
    if len(config.layers) + apart * count > len(names):
        raise CheckpointError(
            f"config.json asks for {len(config.layers)} layers"
            + (f" and {apart} times {count} experts" if count else "")
            + f" but the checkpoint has {len(names)} tensors; it is incomplete or config.json "
            "belongs to another model."
        )
    return make_plan(config, names)


def make_plan(config: ModelConfig, names: Collection[str]) -> DecoderPlan:
    """Lay out the tensors ``config`` asks for, in the spelling the checkpoint uses.

    Args:
        config: what is to be computed.
        names: the checkpoint's tensor names.

    Raises:
        CheckpointError: there is no embedding under any known name.
    """
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in names), None)
    if prefix is None:
        raise CheckpointError(
            "Tensor 'model.embed_tokens.weight' is missing; the checkpoint is incomplete or "
            f"not a decoder. It holds, among others: {', '.join(sorted(names)[:3]) or 'nothing'}."
        )
    shape = (config.vocab_size, config.hidden_size)
    embedding = f"{prefix}embed_tokens.weight"
    head = _PREFIXES[prefix]
    return DecoderPlan(
        embedding=Stack(embedding, ((embedding, shape[0]),), shape[1]),
        norm=(f"{prefix}norm.weight", config.hidden_size),
        head=None if config.tied else Stack(head, ((head, shape[0]),), shape[1]),
        layers=tuple(
            _layer(config, spec, f"{prefix}layers.{i}", names)
            for i, spec in enumerate(config.layers)
        ),
    )


def _layer(config: ModelConfig, spec: LayerSpec, at: str, names: Collection[str]) -> LayerPlan:
    hidden, head = config.hidden_size, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    if f"{at}.self_attn.qkv_proj.weight" in names:
        parts = [("qkv_proj", q + 2 * kv)]
    router, mlps = _mixture(config, at, names) if spec.experts else (None, _mlp(config, at, names))
    return LayerPlan(
        norms=_norms(config, at),
        qkv=_stack(f"{at}.self_attn", parts, hidden, config.qkv_bias),
        output=_stack(f"{at}.self_attn", [("o_proj", hidden)], q, config.output_bias),
        mlps=mlps,
        router=router,
    )


_Pairs = tuple[tuple[Stack, Stack], ...]


def _mlp(config: ModelConfig, at: str, names: Collection[str]) -> _Pairs:
    inner, hidden, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
    parts = [("gate_proj", inner), ("up_proj", inner)]
    if f"{at}.mlp.gate_up_proj.weight" in names:
        parts = [("gate_up_proj", 2 * inner)]
    gate_up = _stack(f"{at}.mlp", parts, hidden, bias)
    return ((gate_up, _stack(f"{at}.mlp", [("down_proj", hidden)], inner, bias)),)


def _stack(at: str, parts: list[tuple[str, int]], in_features: int, bias: bool = False) -> Stack:
    named = tuple((f"{at}.{part}.weight", rows) for part, rows in parts)
    return Stack(f"{at}.{'+'.join(part for part, _ in parts)}", named, in_features, bias)


def _norms(config: ModelConfig, at: str) -> dict[str, tuple[str, int]]:
    found = {
        role: (f"{at}.{name}.weight", config.hidden_size)
        for role in ("before_attention", "after_attention", "before_mlp", "after_mlp")
        if (name := getattr(config.norms, role)) is not None
    }
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        heads = (config.num_heads, config.num_kv_heads) if full else (1, 1)
        for role, count in zip(("q", "k"), heads, strict=True):
            found[role] = (f"{at}.self_attn.{role}_norm.weight", count * config.head_dim)
    return found


def _mixture(config: ModelConfig, at: str, names: Collection[str]) -> tuple[Stack, _Pairs]:
    """A router and its experts, each its own tensors or slices of one tensor for all."""
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None, "a layer with experts needs their specification"
    at = next(
        (f"{at}.{p}" for p in experts.prefixes if f"{at}.{p}.gate.weight" in names),
        f"{at}.{experts.prefixes[0]}",
    )
    inner, count = experts.intermediate_size, experts.count
    router = _stack(at, [("gate", count)], hidden)
    first, second = f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"
    if first in names:
        return router, tuple(
            (
                Stack(first, ((first, 2 * inner),), hidden, expert=i, expert_count=count),
                Stack(second, ((second, hidden),), inner, expert=i, expert_count=count),
            )
            for i in range(count)
        )
    halves = [(experts.gate, inner), (experts.up, inner)]
    return router, tuple(
        (
            _stack(f"{at}.experts.{i}", halves, hidden),
            _stack(f"{at}.experts.{i}", [(experts.down, hidden)], inner),
        )
        for i in range(count)
    )


def check_plan(plan: DecoderPlan, source: TensorSource) -> None:
    """Compare what is needed with what is there, without reading a tensor.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no place in the model.
    """
    wanted, present = plan.tensors(), set(source.names())
    missing = sorted(wanted.keys() - present)
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {_listed(missing)} of shape "
            f"{list(wanted[missing[0]])}; the checkpoint is incomplete or config.json belongs "
            "to another model."
        )
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"Tensor {short(name)} has shape {list(source.shape(name))} where config.json "
                f"asks for {list(shape)}; do they belong to the same model?"
            )
    extra = sorted(
        name
        for name in present - wanted.keys()
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(_OTHER_PARTS)
    )
    if plan.head is None:
        extra = [name for name in extra if not name.endswith("lm_head.weight")]
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors have no place in this model, first {_listed(extra)}; "
            "config.json does not describe these weights."
        )


def _listed(names: Iterable[str], count: int = 3) -> str:
    return ", ".join(short(name) for name in list(names)[:count])
