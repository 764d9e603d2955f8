"""The one decoder: every supported architecture is a `ModelConfig` of it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coppice.kernels.interface import Ops
from coppice.kernels.program import Program
from coppice.kernels.rows import Rows
from coppice.models.compile import as_program
from coppice.models.config import LayerSpec, ModelConfig
from coppice.models.kv import KVLayout, KVPages
from coppice.models.mlp import FeedForward
from coppice.models.rope import RopeTable
from coppice.models.weights import DecoderWeights, LayerWeights
from coppice.weights import F32, Linear


class Decoder:
    """Runs rows through the model once.

    Args:
        config: what to compute.
        weights: the packed weights.
        ops: the operators that packed them.
        max_context: positions to serve, at most ``config.max_position`` (the default). It
            decides which frequencies a LongRoPE model uses, see `coppice.models.rope`.
        dtype: precision of KV pages; that of the embedding where it is kept as floats, and
            bfloat16 elsewhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        ops: Ops,
        *,
        max_context: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.max_context = min(max_context or config.max_position, config.max_position)
        self._ops = ops
        if dtype is None:
            dtype = torch.float32 if weights.embedding.format == F32 else torch.bfloat16
        self._kv_dtype = dtype
        self._scale = _rounded(math.sqrt(config.hidden_size), dtype, config.scale_embedding)
        specs = (*config.ropes, None)  # the last one for layers without positions
        self._tables = [RopeTable(spec, self.max_context, weights.norm) for spec in specs]
        each = [self._tables[-1 if spec.rope is None else spec.rope] for spec in config.layers]
        self._blocks = [
            Block(config, spec, layer, ops, table)
            for spec, layer, table in zip(config.layers, weights.layers, each, strict=True)
        ]
        self._rotations = each

    @cached_property
    def program(self) -> Program | None:
        """The whole as one call, made when first asked for: from then on weights stay as they are.

        None where `as_program` or the device knows no such thing.
        """
        described = as_program(
            self.config, self.weights, self._rotations, embedding_scale=self._scale
        )
        return None if described is None else self._ops.compile(described)

    def another(self) -> Decoder:
        """A decoder over the very same packed weights, with tables and buffers of its own.

        Both may compute at the same time.
        """
        return self._over(self.weights)

    def with_int8_rows(self) -> Decoder | None:
        """This decoder over the very same packed weights, quicker and less exact.

        Rows are made int8 before they meet integer codes that otherwise meet float rows.

        Returns:
            None where no layer would compute anything else: weights are kept as floats, or
            rows are made int8 already.
        """
        weights = self.weights.with_activations("int8")
        if weights.formats() == self.weights.formats():
            return None
        return self._over(weights)

    def _over(self, weights: DecoderWeights) -> Decoder:
        return Decoder(
            self.config, weights, self._ops, max_context=self.max_context, dtype=self._kv_dtype
        )

    def kv_layout(self, page_size: int) -> KVLayout:
        """The KV cache this model needs, at the precision of its weights."""
        config = self.config
        return KVLayout(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=self._kv_dtype,
            device=torch.device(self._ops.device),
        )

    def embed(self, rows: Rows) -> Tensor:
        """What the first layer is given: ``[T, hidden]``."""
        x = self.weights.embedding.gather(rows.token)
        return x if self._scale == 1.0 else x * self._scale

    def run_layer(
        self, index: int, x: Tensor, rows: Rows, *, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        """One layer alone, ``x [T, hidden]`` to ``[T, hidden]`` (calibration, measurements)."""
        self._reach(rows)
        return self._blocks[index](x, rows, k_pages, v_pages, None)

    def forward(self, rows: Rows, pool: KVPages) -> Tensor:
        """Write the rows' K and V into ``pool`` and compute logits for the wanted rows.

        Returns:
            ``[W, V]`` float32 for ``rows.logit_rows``, in order.

        Raises:
            EngineError: a position is beyond ``max_context``.
        """
        rows = rows.to(self._ops.device)
        if self.program is None:
            logits = self.by_operators(rows, pool)
        else:
            logits = self.program(rows, pool.k, pool.v)
        if self.config.logit_softcap:
            cap = self.config.logit_softcap
            logits = torch.tanh(logits / cap) * cap
        return logits

    def greedy(self, rows: Rows, pool: KVPages, vocab_size: int) -> list[int] | None:
        """`forward`, told only each wanted row's most likely token; see `Program.greedy`.

        Returns:
            None, with nothing done, where logits must be asked for: there is no program, or
            a softcap may make equals of unequal logits.
        """
        if self.program is None or self.config.logit_softcap:
            return None
        return self.program.greedy(rows.to(self._ops.device), pool.k, pool.v, vocab_size)

    def by_operators(self, rows: Rows, pool: KVPages) -> Tensor:
        """Logits before any softcap, by one operator after another.

        This is what a program must compute bit for bit, and how models run for which there
        is none: mixtures of experts, and devices without programs.
        """
        ops, weights, config = self._ops, self.weights, self.config
        self._reach(rows)
        x = self.embed(rows)  # [T, hidden]
        last = len(self._blocks) - 1
        wanted = rows.logit_rows if rows.logit_rows.shape[0] < rows.num_rows else None
        for i, block in enumerate(self._blocks):
            x = block(x, rows, pool.k[i], pool.v[i], wanted if i == last else None)
        x = ops.rms_norm(x, weights.norm, eps=config.norm_eps)  # [W, hidden]
        return weights.head(x)

    def _reach(self, rows: Rows) -> None:
        """Make sure the rope tables cover the rows' positions."""
        positions = int(rows.position.max()) + 1
        for table in self._tables:
            table.reach(positions)


def _rounded(value: float, dtype: torch.dtype, wanted: bool) -> float:
    """``value`` as the dtype holds it (Gemma multiplies in the weights' dtype), or 1."""
    return float(torch.tensor(value).to(dtype)) if wanted else 1.0


class Block:
    """One decoder layer: attention and feed-forward, each added to its input."""

    __slots__ = ("_attend", "_eps", "_ops", "_rope", "_table", "_weights")

    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        weights: LayerWeights,
        ops: Ops,
        table: RopeTable,
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._table = table
        self._eps = config.norm_eps
        self._rope: dict[str, Any] = {
            "num_heads": config.num_heads,
            "qk_norm": config.qk_norm,
            "q_weight": weights.q_norm,
            "k_weight": weights.k_norm,
            "eps": config.norm_eps,
        }
        self._attend: dict[str, Any] = {
            "scale": config.attention_scale,
            "window": spec.window,
            "softcap": config.attention_softcap,
        }

    def __call__(
        self, x: Tensor, rows: Rows, k_pages: Tensor, v_pages: Tensor, wanted: Tensor | None
    ) -> Tensor:
        """``x [T, hidden]`` to ``[T, hidden]``, or to the ``wanted`` rows of it."""
        ops, w = self._ops, self._weights
        y = w.qkv(self._norm(x, w.before_attention))  # [T, (H + 2K) * D]
        q = ops.rope_append(y, rows, k_pages, v_pages, self._table.cos_sin, **self._rope)
        y = ops.attention(q, rows, k_pages, v_pages, **self._attend)  # [T, H * D]
        if wanted is not None:  # K and V are in place: from here on, rows stand alone
            x, y = x.index_select(0, wanted), y.index_select(0, wanted)
        x = self._add(w.output, y, x, w.after_attention)
        return self._add(w.mlp, self._norm(x, w.before_mlp), x, w.after_mlp)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._ops.rms_norm(x, weight, eps=self._eps)

    def _add(self, part: FeedForward | Linear, y: Tensor, x: Tensor, norm: Tensor | None) -> Tensor:
        """``x + part(y)``, with the part's output normed first where there is a norm."""
        if norm is None:
            return part(y, x)
        return x + self._ops.rms_norm(part(y), norm, eps=self._eps)
