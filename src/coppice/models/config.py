"""What a decoder computes, read from a checkpoint's ``config.json``.

The decoder sees only these records: no architecture name survives past
`coppice.models.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coppice.kernels.interface import Activation, QKNorm
from coppice.models.rope import RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer.

    Attributes:
        window: tokens a row sees back, itself included; 0 for all.
        rope: index into `ModelConfig.ropes`, or None for a layer without positions.
        experts: the feed-forward part is a mixture of experts.
    """

    window: int = 0
    rope: int | None = 0
    experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Checkpoint names of a layer's norms; None where the architecture has none there."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """A mixture of experts: each row's feed-forward is a weighted sum of ``top_k`` experts.

    Attributes:
        renormalize: the chosen experts' weights are scaled to sum to one.
        prefixes: where checkpoints keep the block, below a layer.
        gate, up, down: names of one expert's matrices.
    """

    count: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    prefixes: tuple[str, ...] = ("mlp",)
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that decides what is computed.

    Attributes:
        max_position: longest context, in tokens.
        norms: which norms a layer has and how they are called.
        norm_offset: added to norm weights at load (1.0 where ``(1 + w)`` is meant).
        qk_norm: norm of queries and keys: none, per head, or over all heads at once.
        attention_scale: multiplies query-key products.
        attention_softcap: ``c`` in ``c * tanh(s / c)`` on attention logits; 0 for none.
        logit_softcap: the same on the final logits.
        scale_embedding: embeddings are multiplied by ``sqrt(hidden_size)``, rounded to the
            dtype of the weights.
        tied: the output matrix is the embedding.
        eos_token_ids: tokens that end a turn, as the checkpoint names them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    attention_scale: float
    activation: Activation = "silu"
    norm_eps: float = 1e-6
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    scale_embedding: bool = False
    tied: bool = False
    experts: ExpertSpec | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)


ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""``hidden_act`` in Hugging Face's words to ours."""
