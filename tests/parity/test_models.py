"""Coppice against transformers: the same logits and the same greedy tokens."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.kernels import get_ops
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from coppice.models.load import LoadedModel, load_model
from tests.parity.toys import TOYS, reference

PAGE_SIZE = 16
PROMPT = 200
GREEDY = 64
TOLERANCE = 1e-4

CASES = [(family, i) for family in TOYS for i in range(3)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The reference model and ours, loaded from the same saved checkpoint."""
    family, index = request.param
    theirs = reference(family, copy.deepcopy(TOYS[family][index]), seed=1000 + index)
    folder: Path = tmp_path_factory.mktemp(family)
    theirs.save_pretrained(folder)
    ours = load_model(folder, dtype="float32", ops=get_ops())
    return theirs, ours


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 211, (length,), generator=generator).tolist()


def make_pool(decoder: Decoder, pages: int = 20) -> tuple[KVPool, list[int]]:
    """A pool, and a page table that is out of order on purpose."""
    pool = KVPool(decoder.kv_layout(PAGE_SIZE), pages + 1)
    return pool, list(range(pages, 0, -1))


def run(decoder: Decoder, tokens: list[int], chunk: int) -> Tensor:
    """Logits ``[len(tokens), V]`` of a prompt processed ``chunk`` tokens at a time."""
    pool, pages = make_pool(decoder)
    parts = [
        decoder.forward(Rows.chunk(tokens[i : i + chunk], pages, start=i), pool)
        for i in range(0, len(tokens), chunk)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def test_logits_match_at_every_position(pair: tuple[torch.nn.Module, LoadedModel]) -> None:
    theirs, ours = pair
    tokens = prompt(7)
    expected = theirs(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.05, "the toy says the same everywhere: the test would be blind"
    whole = run(ours.decoder, tokens, PROMPT)
    chunked = run(ours.decoder, tokens, 64)
    assert (whole - expected).abs().max() < TOLERANCE
    assert (chunked - expected).abs().max() < TOLERANCE
    assert torch.equal(whole, chunked)


@torch.inference_mode()
def test_greedy_tokens_match(pair: tuple[torch.nn.Module, LoadedModel]) -> None:
    theirs, ours = pair
    tokens = prompt(8)
    generated = theirs.generate(
        torch.tensor([tokens]),
        max_new_tokens=GREEDY,
        min_new_tokens=GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = generated[0, PROMPT:].tolist()
    pool, pages = make_pool(ours.decoder)
    found: list[int] = []
    fresh = tokens
    start = 0
    for _ in range(GREEDY):
        logits = ours.decoder.forward(Rows.chunk(fresh, pages, start=start), pool)
        start += len(fresh)
        fresh = [int(logits[-1].argmax())]
        found += fresh
    assert found == expected
