"""From settings to a speculator: which proposers, over which models, at what cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from coppice.cost import StepCost
from coppice.engine.config import EngineConfig
from coppice.engine.loading import EngineModel, tokenizer_of
from coppice.engine.sequence import Sequence
from coppice.errors import ConfigError
from coppice.models.decoder import Decoder as RealDecoder
from coppice.models.load import LoadedModel, load_model
from coppice.models.locate import BUNDLED, BUNDLED_DRAFT
from coppice.scheduling import Grant, rows_of_guesses, tokens_needed
from coppice.speculation import (
    Controller,
    DraftModel,
    DraftTree,
    History,
    PromptLookup,
    Proposer,
    SelfDraft,
    Speculator,
    SuffixProposer,
)
from coppice.speculation.shapes import BestShapes, Shape
from coppice.speculation.verify import Rule

TYPICAL_SWOR = (0.6, 0.16, 0.07, 0.04, 0.02, 0.015, 0.01, 0.008)
TYPICAL_MSS = (0.6, 0.11, 0.05, 0.03, 0.015, 0.01, 0.006, 0.004)
"""Chances that the child of each rank is the accepted one, for shapes without measurements."""


def make_speculator(
    config: EngineConfig,
    model: EngineModel,
    cost: StepCost,
    num_pages: int,
    draft: LoadedModel | None = None,
    *,
    on_trial: bool = True,
) -> Speculator | None:
    """The configured speculator, or None when speculation is off.

    Args:
        config: ``speculate``, ``speculate_depth``, ``verify`` and the history's.
        model: the target.
        cost: what its steps take.
        num_pages: KV pages of the target; a draft model has as many of its own.
        draft: what `load_draft` gave.
        on_trial: whether a proposer rests that costs more than it saves, under ``auto`` and
            ``self``.

    Raises:
        ConfigError: the target cannot draft for itself and was asked to.
    """
    if config.speculate == "off":
        return None
    controller = Controller(cost.time, config.speculate_depth)
    proposers: list[Proposer] = []
    if config.speculate == "lookup":
        proposers.append(PromptLookup())
    if config.speculate in ("auto", "suffix"):
        proposers.append(SuffixProposer(_history(config, model)))
    if draft is not None:
        proposers.append(_draft_model(config, draft, num_pages, controller.token_s))
    if config.speculate == "self":
        proposers.append(_self_draft(model))
    return Speculator(
        proposers,
        controller,
        model.facts.vocab_size,
        max_nodes=config.speculate_nodes,
        on_trial=on_trial and config.speculate in ("auto", "self"),
    )


def _history(config: EngineConfig, model: EngineModel) -> History | None:
    if config.history_mib == 0:
        return None
    return History(
        config.history_mib << 20,
        folder=config.cache_folder / "history" if config.keep_history else None,
        vocabulary=model.tokenizer.vocabulary_fingerprint,
    )


def load_draft(config: EngineConfig, model: EngineModel) -> LoadedModel | None:
    """The configured draft model, or None where none is wanted.

    Raises:
        ConfigError: it has another vocabulary, or none is named.
    """
    if config.speculate not in ("auto", "draft"):
        return None
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
    return loaded


def _draft_model(
    config: EngineConfig, loaded: LoadedModel, num_pages: int, token_s: Callable[[], float]
) -> DraftModel:
    return DraftModel(
        loaded.decoder,
        num_pages=num_pages,
        page_size=config.page_size,
        max_context=loaded.decoder.max_context,
        depth=config.speculate_depth,
        rule=config.verify,
        shape=None if config.verify == "match" else _shape_for(config.verify),
        token_s=token_s,
    )


def _self_draft(model: EngineModel) -> SelfDraft:
    decoder = model.decoder
    quick = decoder.with_int8_rows() if isinstance(decoder, RealDecoder) else None
    if quick is None:
        raise ConfigError(
            "speculate=self drafts with int8 rows on weights that are multiplied with float rows, "
            f"but {model.facts.name!r} has {model.facts.weight_format} weights; choose a "
            "quantization that ends in '-weight-only', or speculate by 'draft' or 'suffix'.",
            param="speculate",
        )
    return SelfDraft(quick)


def _shape_for(rule: Rule) -> Callable[[int, int], Shape]:
    """The shape of a tree of so many nodes and levels; a chain where the rule takes no more."""

    @functools.cache
    def shape(num_nodes: int, levels: int) -> Shape:
        if rule == "chain":
            return Shape.expansion([1] * levels)
        ranks = TYPICAL_MSS if rule == "mss" else TYPICAL_SWOR
        return BestShapes(ranks, num_nodes + 1, levels + 1).shape(num_nodes + 1, levels + 1)

    return shape


def trees_for(
    speculator: Speculator,
    running: Iterable[Sequence],
    grants: Iterable[Grant],
    cost: StepCost,
    *,
    now: float,
    most_rows: int,
) -> dict[int, DraftTree]:
    """Trees for the sequences that are granted their last token.

    Args:
        speculator: grows them.
        running: every sequence in the batch.
        grants: rows of this step.
        cost: what steps take.
        now: seconds.
        most_rows: of the step, trees included.
    """
    wishes = any(s.tpot_s is not None for s in running)
    if not wishes and speculator.skips(running):
        return {}
    rows, views = 0, list[Sequence]()
    for grant in grants:
        rows += grant.num_rows
        s = grant.sequence
        decodes = grant.num_rows == 1 and s.num_tokens - s.num_computed == 1
        if decodes and isinstance(s, Sequence) and s.num_generated and s.speculate != "off":
            views.append(s)
    needs = {}
    if wishes:
        step_s = cost.time(rows + rows_of_guesses(views))
        needs = {s.arrival: tokens_needed(s, now, step_s) for s in views}
    return speculator.grow(views, rows=rows, spare=max(0, most_rows - rows), needs=needs)
