"""Time the loaded model on this machine: what the cost model is fitted from."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from coppice.cache.pool import KVPool
from coppice.cost import Sample, StepCurve, fit, read_curve, save_curve
from coppice.engine.config import EngineConfig, KVDType
from coppice.engine.loading import EngineModel
from coppice.engine.messages import ModelFacts
from coppice.kernels.rows import Rows

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 512
"""Cached tokens behind the rows of a sample that is to show the price of a key."""
MOST_LOGITS = 32
"""Steps up to so many rows are taken for trees, whose rows all want logits."""


def calibrate(
    model: EngineModel,
    *,
    kv: KVDType = "auto",
    seconds: float = 6.0,
    progress: Callable[[int, int], None] | None = None,
) -> StepCurve:
    """Measure forward passes of many sizes and fit the curve.

    Args:
        model: the loaded model; it is not changed.
        kv: how K and V are kept; reading them costs accordingly.
        seconds: about how long the measuring may take; each size runs at least thrice.
        progress: called with sizes done and sizes in all.
    """
    runs = list(_runs(model, kv))
    samples: list[Sample] = []
    for done, (rows, keys, run) in enumerate(runs):
        if progress is not None:
            progress(done, len(runs))
        samples.append(Sample(rows, keys, _median_s(run, seconds / len(runs))))
    if progress is not None:
        progress(len(runs), len(runs))
    return fit(samples)


def curve_for(config: EngineConfig, model: EngineModel) -> StepCurve | None:
    """The kept curve of this model here; where speculation needs one, it is made now.

    That takes a second, once: the curve is kept for the next start.
    """
    path = curve_path(config.cache_folder, model.facts)
    curve = read_curve(path)
    if curve is None and config.speculate != "off":
        curve = calibrate(model, kv=config.kv_cache_dtype, seconds=1.0)
        try:
            save_curve(curve, path)
        except OSError as error:
            _log.warning("The step curve could not be kept in %s: %s", path, error)
    return curve


def curve_path(folder: Path, facts: ModelFacts) -> Path:
    """Where the curve of a model with these kernels and threads on this processor lies.

    The model's fingerprint says how it keeps K and V, too.
    """
    parts = [facts.fingerprint, facts.kernels, str(facts.num_threads), _processor()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return folder / "curves" / f"{facts.name}-{name}.json"


def _runs(model: EngineModel, kv: KVDType) -> Iterator[tuple[int, int, Callable[[], object]]]:
    page = model.facts.page_size
    longest = min(model.facts.context_length, CONTEXT + ROWS[-1])
    layout = model.decoder.kv_layout(page).stored_as(kv)
    pool = KVPool(layout, -(-longest // page))
    for pages in (*pool.k, *pool.v):
        pages.zero_()
    for context in (0, CONTEXT):
        for rows in ROWS:
            if context + rows <= longest:
                yield rows, context * rows, _forward(model, pool, rows, context)


def _forward(model: EngineModel, pool: KVPool, rows: int, context: int) -> Callable[[], object]:
    tokens = [1 + i % (model.facts.vocab_size - 1) for i in range(rows)]
    chunk = Rows.chunk(tokens, list(range(pool.num_pages)), context)
    # As in serving: a verified tree wants all its logits, a prefill chunk one row's.
    wanted = torch.arange(rows if rows <= MOST_LOGITS else 1, dtype=torch.int32)
    chunk = dataclasses.replace(chunk, logit_rows=wanted)
    return lambda: model.decoder.forward(chunk, pool)


def _median_s(run: Callable[[], object], budget_s: float) -> float:
    """Median seconds of a run over at least three, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 50):  # noqa: PLR2004
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    return next((line for line in lines if line.startswith(("model name", "CPU part"))), "unknown")
