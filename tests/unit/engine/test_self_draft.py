"""The target drafting for itself: whose weights, whose pages, and what is in them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from coppice.cache.pool import KVPool
from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import EngineModel, load_engine_model
from coppice.engine.request import Request, SamplingParams
from coppice.engine.speculate import make_speculator
from coppice.errors import ConfigError
from coppice.kernels.pages import read_keys, read_values
from coppice.kernels.rows import Rows
from coppice.models.decoder import Decoder
from tests.kits.models import SMALL
from tests.kits.proposers import FreeRows

CONFIG = EngineConfig(
    model=SMALL, quantization="int4-weight-only", speculate="self", kv_cache_mib=8, page_size=16
)
PROMPTS = ["Once upon a time there was", "def read_file(path):", "She looked at him, and"]


@pytest.fixture(scope="module")
def model() -> EngineModel:
    return load_engine_model(CONFIG)


def start(model: EngineModel, **settings: Any) -> Engine:
    """An engine whose rows cost nothing, so that it always guesses as deep as it may."""
    config = replace(CONFIG, **settings)
    if config.speculate == "off":
        return Engine(model, config)
    # No trial: how much is guessed must not depend on how busy the machine is.
    speculator = make_speculator(config, model, FreeRows(), num_pages=1, on_trial=False)
    return Engine(model, config, speculator=speculator)


def submit(engine: Engine, model: EngineModel, temperature: float = 0.8, tokens: int = 40) -> None:
    sampling = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True)
    for i, text in enumerate(PROMPTS):
        prompt = model.tokenizer.encode(text)
        seeded = msgspec.structs.replace(sampling, seed=i)
        engine.submit(Request(id=str(i), prompt=prompt, sampling=seeded))


def finish(engine: Engine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.tokens)
    return found


def kept(pool: KVPool, pages: Sequence[int], count: int, head_dim: int) -> Tensor:
    """K and V of the first ``count`` slots, ``[2 * layers, count, K, D]``."""
    size = pool.layout.page_size
    page = torch.tensor([pages[i // size] for i in range(count)])
    offset = torch.arange(count) % size
    k = [read_keys(pages, page, offset, head_dim) for pages in pool.k]
    v = [read_values(pages, page, offset, head_dim) for pages in pool.v]
    return torch.stack(k + v)


def prefilled(decoder: Decoder, pool: KVPool, tokens: list[int]) -> Tensor:
    """What one plain prefill of the tokens leaves in pages of its own."""
    own = KVPool(pool.layout, -(-len(tokens) // pool.layout.page_size))
    pages = list(range(own.num_pages))
    decoder.forward(Rows.chunk(tokens, pages), own)
    return kept(own, pages, len(tokens), pool.layout.head_dim)


def test_no_weight_is_resident_twice(model: EngineModel) -> None:
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    twin = decoder.with_int8_rows()
    assert twin is not None
    ours, theirs = decoder.weights, twin.weights
    assert theirs.head is theirs.embedding  # tied, as the target's are
    pairs = [(ours.embedding, theirs.embedding)]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        pairs += [(a.qkv, b.qkv), (a.output, b.output)]
        pairs += zip(a.mlp.linears(), b.mlp.linears(), strict=True)
    for one, other in pairs:
        assert one.format.activations == "float"
        assert other.format.activations == "int8"
        assert one.tensors.keys() == other.tensors.keys()
        for role, tensor in one.tensors.items():
            assert tensor.data_ptr() == other.tensors[role].data_ptr(), f"{one.name} {role}"


def test_the_twin_computes_what_its_format_would(model: EngineModel) -> None:
    """The shared codes with int8 rows give the bits of a model loaded as int4."""
    decoder, other = model.decoder, load_engine_model(replace(CONFIG, quantization="int4")).decoder
    assert isinstance(decoder, Decoder)
    twin = decoder.with_int8_rows()
    assert twin is not None
    rows = Rows.chunk(model.tokenizer.encode(PROMPTS[0]), [0, 1])
    found = [d.forward(rows, KVPool(d.kv_layout(16), 2)) for d in (twin, other, decoder)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_pages_hold_the_targets_own_values_after_every_step(model: EngineModel, kv: Any) -> None:
    decoder = model.decoder
    assert isinstance(decoder, Decoder)
    engine = start(model, kv_cache_dtype=kv)
    submit(engine, model)
    pool, steps, checked, twin = engine._runner.pool, 0, 0, decoder.with_int8_rows()
    assert twin is not None
    while engine.has_work:
        engine.step()
        steps += 1
        for s in engine._running if steps % 4 == 0 else ():
            tokens = s.tokens[: s.num_computed]
            held = kept(pool, s.pages, len(tokens), pool.layout.head_dim)
            assert torch.equal(held, prefilled(decoder, pool, tokens))
            # Had the draft's values been left, this would have told:
            assert not torch.equal(held, prefilled(twin, pool, tokens))
            checked += 1
    assert checked
    assert engine.speculated["accepted"] > 40
    assert engine.speculated["faults"] == 0
    engine.check_pages()


def test_drafts_are_written_to_pages_nobody_else_sees(
    model: EngineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a page of the prefix tree nor one of two owners, in front of what is committed."""
    engine = start(model)
    twin = engine._speculator._proposers[-1]._decoder
    whole, seen = twin.forward, list[tuple[bool, int, int]]()

    def watch(rows: Rows, pool: KVPool) -> Tensor:
        """Of each row: is its page published, who holds it, how far behind the committed end."""
        published = set(engine.pages.tree.pages())
        computed = {s.pages[-1]: s.num_computed for s in engine._running}
        for i, slot in enumerate(rows.slot.tolist()):
            pages = rows.page_table[rows.sequence[i]]
            page = int(pages[slot // 16])
            last = int(pages[pages >= 0][-1])
            refs = engine.pages.allocator.refs(page)
            seen.append((page in published, refs, computed[last] - slot))
        return whole(rows, pool)

    monkeypatch.setattr(twin, "forward", watch)
    for _ in range(2):  # the second time on cached beginnings
        submit(engine, model, temperature=0.0)
        finish(engine)
    assert len(seen) > 100
    assert not [each for each in seen if each[0] or each[1] != 1 or each[2] > 0]
    assert engine.pages.hit_tokens > 0


def test_what_is_published_is_a_plain_prefill(model: EngineModel) -> None:
    engine, decoder = start(model), model.decoder
    assert isinstance(decoder, Decoder)
    submit(engine, model)
    found = finish(engine)
    for i, text in enumerate(PROMPTS):
        tokens = [*model.tokenizer.encode(text), *found[str(i)]]
        match = engine.pages.tree.match(tokens, "")
        count = 16 * len(match.pages)
        assert count >= 32
        pool = engine._runner.pool
        held = kept(pool, match.pages, count, pool.layout.head_dim)
        assert torch.equal(held, prefilled(decoder, pool, tokens[:count]))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_same_answers_where_pages_run_out(model: EngineModel, temperature: float) -> None:
    plain, engine = start(model, speculate="off"), start(model)
    spare = engine.pages.allocator
    taken = [spare.alloc() for _ in range(engine.num_pages - 6)]  # three answers want nine
    for each in (plain, engine):
        submit(each, model, temperature)
    assert finish(engine) == finish(plain)
    assert engine.stats().preemptions > 0
    assert engine.speculated["faults"] == 0
    for page in taken:
        spare.release(page)
    engine.check_pages()


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_refused_where_the_draft_would_be_the_target(quantization: Any) -> None:
    config = replace(CONFIG, quantization=quantization)
    with pytest.raises(ConfigError, match="-weight-only") as refused:
        Engine(load_engine_model(config), config)
    assert refused.value.param == "speculate"
