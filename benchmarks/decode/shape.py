"""What a model's forward pass has to do: operations counted from its configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder whose output matrix is its embedding.

    Attributes:
        vocab_size: rows of the output matrix.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        attention_width: query heads times head dimension.
        body: parameters of all matrices but the embedding.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    attention_width: int
    body: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Read ``config.json``."""
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        query, key = heads * head_dim, config["num_key_value_heads"] * head_dim
        attention = 2 * hidden * query + 2 * hidden * key
        per_layer = attention + 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"]
        return cls(config["vocab_size"], hidden, layers, query, layers * per_layer)

    @property
    def head(self) -> int:
        """Parameters of the output matrix."""
        return self.vocab_size * self.hidden_size

    def linear_ops(self, rows: int, logit_rows: int) -> float:
        """Multiplications and additions in all linear layers."""
        return 2.0 * (rows * self.body + logit_rows * self.head)

    def attention_ops(self, rows: int, context: int) -> float:
        """Those of queries with keys and weights with values; rows follow ``context`` tokens."""
        seen = rows * context + rows * (rows + 1) / 2
        return 4.0 * seen * self.attention_width * self.layers


def roofline_s(size_bytes: float, ops: float, *, bytes_s: float, ops_s: float) -> float:
    """The least seconds a pass can take: the slower of reading and computing."""
    return max(size_bytes / bytes_s, ops / ops_s)
