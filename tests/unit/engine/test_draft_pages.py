"""The pages of a draft model come out of the memory that was set aside for KV."""

from __future__ import annotations

from coppice.engine.config import EngineConfig
from coppice.engine.engine import Engine
from coppice.engine.loading import load_engine_model
from coppice.speculation import DraftModel


def test_target_and_draft_pages_together_fit_the_budget(monkeypatch) -> None:
    made = []
    whole = DraftModel.__init__

    def watch(self, decoder, *, num_pages, **rest):
        made.append((decoder.kv_layout(32).page_bytes, num_pages))
        whole(self, decoder, num_pages=num_pages, **rest)

    monkeypatch.setattr(DraftModel, "__init__", watch)
    config = EngineConfig(kv_cache_mib=8, speculate="draft", page_size=32)
    model = load_engine_model(config)
    engine = Engine(model, config)
    own = model.decoder.kv_layout(32).page_bytes
    [(draft, num_pages)] = made
    budget = 8 << 20
    assert num_pages == engine.num_pages == budget // (own + draft)
    alone = Engine(model, EngineConfig(kv_cache_mib=8, page_size=32))
    assert alone.num_pages == budget // own > engine.num_pages
