"""Frequencies against transformers' own functions, and the table's independence of use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coppice.errors import EngineError
from coppice.models.rope import RopeTable, frequencies, read_rope

LAWS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "attention_factor": 0.9,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(64)],
        "long_factor": [2.0 + i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
    {"rope_type": "dynamic", "factor": 4.0},
]


def config(law: dict[str, Any]) -> LlamaConfig:
    parameters = {"rope_theta": 500_000.0, **law}
    return LlamaConfig(
        hidden_size=1024,
        num_attention_heads=8,
        max_position_embeddings=131_072,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law["rope_type"])
@pytest.mark.parametrize("context", [1024, 131_072])
def test_frequencies_match_transformers(law: dict[str, Any], context: int) -> None:
    theirs = ROPE_INIT_FUNCTIONS[law["rope_type"]](config(dict(law)), "cpu", seq_len=context)
    spec = read_rope(law, theta=500_000.0, head_dim=128, max_position=131_072)
    inverse, scale = frequencies(spec, context)
    torch.testing.assert_close(inverse, theirs[0], rtol=1e-6, atol=0)
    assert scale == pytest.approx(theirs[1], rel=1e-12)


def test_table_does_not_depend_on_when_it_was_filled() -> None:
    spec = read_rope({}, theta=10_000.0, head_dim=24, max_position=10_000)
    at_once, stepwise = (RopeTable(spec, 10_000, torch.empty(0)) for _ in range(2))
    at_once.reach(10_000)
    for positions in (1, 7, 4097, 5000, 9999, 10_000):
        stepwise.reach(positions)
    assert torch.equal(at_once.cos_sin, stepwise.cos_sin)


def test_a_declared_context_takes_no_memory() -> None:
    spec = read_rope({}, theta=10_000.0, head_dim=4096, max_position=1 << 24)
    table = RopeTable(spec, 1 << 24, torch.empty(0))  # 256 GiB, were it made at once
    assert table.cos_sin.nbytes == 0
    table.reach(10)
    assert table.cos_sin.nbytes <= 64 << 20


def test_table_made_in_inference_mode_can_grow_outside() -> None:
    spec = read_rope({}, theta=10_000.0, head_dim=8, max_position=100)
    with torch.inference_mode():
        table = RopeTable(spec, 100, torch.empty(0))
    table.reach(50)
    assert table.cos_sin[1, 0, 0].item() == pytest.approx(0.5403023)


def test_position_beyond_the_context() -> None:
    spec = read_rope({}, theta=10_000.0, head_dim=8, max_position=100)
    with pytest.raises(EngineError, match="beyond the context 100"):
        RopeTable(spec, 100, torch.empty(0)).reach(101)


def test_layers_without_positions_have_an_empty_table() -> None:
    table = RopeTable(None, 50, torch.empty(0))
    table.reach(50)
    assert table.cos_sin.shape == (50, 2, 0)
