"""A decoder in the words of `coppice.kernels.program`."""

from __future__ import annotations

from collections.abc import Sequence

from coppice.kernels.program import DecoderProgram, LayerProgram, Rotation
from coppice.models.config import LayerSpec, ModelConfig
from coppice.models.mlp import GatedMLP
from coppice.models.weights import DecoderWeights, LayerWeights


def as_program(
    config: ModelConfig,
    weights: DecoderWeights,
    rotations: Sequence[Rotation],
    *,
    embedding_scale: float,
) -> DecoderProgram | None:
    """The decoder as data; None where programs lack a part of it.

    That is mixtures of experts, and weights whose columns stand in an order of their own.

    Args:
        config: what to compute.
        weights: the packed weights.
        rotations: each layer's rotary table.
        embedding_scale: multiplies the embeddings.
    """
    linears = [weights.embedding, weights.head]
    for layer in weights.layers:
        linears += [layer.qkv, layer.output, *layer.mlp.linears()]
    if any(linear.order is not None for linear in linears):
        return None
    layers = []
    for spec, layer, rotation in zip(config.layers, weights.layers, rotations, strict=True):
        if not isinstance(layer.mlp, GatedMLP):
            return None
        layers.append(_layer(spec, layer, layer.mlp, rotation))
    return DecoderProgram(
        embedding=weights.embedding.packed,
        head=weights.head.packed,
        norm=weights.norm,
        layers=layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        activation=config.activation,
        qk_norm=config.qk_norm,
        eps=config.norm_eps,
        attention_scale=config.attention_scale,
        attention_softcap=config.attention_softcap,
        embedding_scale=embedding_scale,
    )


def _layer(
    spec: LayerSpec, weights: LayerWeights, mlp: GatedMLP, rotation: Rotation
) -> LayerProgram:
    return LayerProgram(
        qkv=weights.qkv.packed,
        output=weights.output.packed,
        gate_up=mlp.gate_up.packed,
        down=mlp.down.packed,
        rotation=rotation,
        window=spec.window,
        before_attention=weights.before_attention,
        after_attention=weights.after_attention,
        before_mlp=weights.before_mlp,
        after_mlp=weights.after_mlp,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
    )
