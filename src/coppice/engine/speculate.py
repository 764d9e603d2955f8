"""From settings to a speculator: which proposers, over which models, at what cost."""

from __future__ import annotations

from coppice.cost import StepCost
from coppice.engine.config import EngineConfig
from coppice.engine.loading import EngineModel, tokenizer_of
from coppice.errors import ConfigError
from coppice.models.load import load_model
from coppice.models.locate import BUNDLED, BUNDLED_DRAFT
from coppice.speculation import (
    Controller,
    DraftModel,
    History,
    PromptLookup,
    Proposer,
    Speculator,
    SuffixProposer,
)


def make_speculator(
    config: EngineConfig, model: EngineModel, cost: StepCost, num_pages: int
) -> Speculator | None:
    """The configured speculator, or None when speculation is off.

    Args:
        config: ``speculate``, ``draft_model``, ``speculate_depth`` and the history's.
        model: the target.
        cost: what its steps take.
        num_pages: KV pages of the target; a draft model gets as many of its own.

    Raises:
        ConfigError: the draft model has another vocabulary, or none is named.
    """
    if config.speculate == "off":
        return None
    proposers: list[Proposer] = []
    if config.speculate == "lookup":
        proposers.append(PromptLookup())
    if config.speculate in ("auto", "suffix"):
        proposers.append(SuffixProposer(_history(config, model)))
    if config.speculate in ("auto", "draft"):
        draft = _draft_model(config, model, num_pages)
        if draft is not None:
            proposers.append(draft)
    controller = Controller(cost.time, config.speculate_depth)
    return Speculator(proposers, controller, model.facts.vocab_size)


def _history(config: EngineConfig, model: EngineModel) -> History | None:
    if config.history_mib == 0:
        return None
    return History(
        config.history_mib << 20,
        folder=config.cache_folder / "history" if config.keep_history else None,
        vocabulary=model.tokenizer.vocabulary_fingerprint,
    )


def _draft_model(config: EngineConfig, model: EngineModel, num_pages: int) -> DraftModel | None:
    name = config.draft_model or (BUNDLED_DRAFT if config.model == BUNDLED else None)
    if name is None:
        if config.speculate == "draft":
            raise ConfigError(
                "speculate=draft needs a draft model; name one with draft_model.",
                param="draft_model",
            )
        return None
    loaded = load_model(name, dtype=config.dtype)
    theirs = tokenizer_of(loaded).vocabulary_fingerprint
    if theirs != model.tokenizer.vocabulary_fingerprint:
        raise ConfigError(
            f"The draft model {name!r} has another vocabulary than {model.facts.name!r}; a draft "
            "must share its target's tokenizer.",
            param="draft_model",
        )
    return DraftModel(
        loaded.decoder,
        num_pages=num_pages,
        page_size=config.page_size,
        max_context=loaded.decoder.max_context,
    )
