"""From settings to the tiers behind the prefix tree."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from coppice.cache.disk import DiskTier
from coppice.cache.files import Files
from coppice.cache.marks import SECRET_BYTES, Marks
from coppice.cache.pool import KVPool
from coppice.cache.ram import RamTier
from coppice.cache.segment import MOST_SLOTS, SegmentForm
from coppice.cache.segments import SegmentStore
from coppice.cache.tiers import Tiers
from coppice.engine.config import EngineConfig
from coppice.engine.loading import EngineModel
from coppice.engine.messages import TierStats
from coppice.engine.pages import SequencePages
from coppice.errors import ConfigError
from coppice.kernels import describe

SEGMENT_BYTES = 64 << 20
"""Aimed at; less where the bound would hold fewer than eight of them."""


def make_pages(config: EngineConfig, model: EngineModel, pool: KVPool) -> SequencePages:
    """The page operations over a pool, with the configured tiers."""
    tiers = make_tiers(config, model, pool)
    return SequencePages(pool, prefix_cache=config.prefix_cache, tiers=tiers)


def make_tiers(
    config: EngineConfig, model: EngineModel, pool: KVPool, files: Files | None = None
) -> Tiers | None:
    """The configured tiers; None without any.

    Args:
        config: ``kv_ram_mib`` and ``kv_disk_dir``.
        model: whose pages they are.
        pool: holds them.
        files: system calls of the disk tier.

    Raises:
        ConfigError: the bound on disk is too small for a few pages. A folder that cannot be used
            is no error: the tier stays off, with a warning.
    """
    if not config.kv_ram_mib and config.kv_disk_dir is None:
        return None
    namespace = fingerprint(model, pool)
    disk = None
    if config.kv_disk_dir is not None:
        make_store = _store(config, config.kv_disk_dir, namespace, pool, files)
        disk = DiskTier(make_store, pool.layout.page_bytes)
    secret = secrets.token_bytes(SECRET_BYTES) if disk is None else disk.secret
    return Tiers(
        pool,
        Marks(secret, namespace),
        ram=RamTier(config.kv_ram_mib << 20) if config.kv_ram_mib else None,
        disk=disk,
    )


def tier_stats(tiers: Tiers | None) -> list[TierStats]:
    """Figures of the tiers there are."""
    found: list[TierStats] = []
    if tiers is None:
        return found
    hits, misses = tiers.hits, tiers.misses
    if (ram := tiers.ram) is not None:
        found.append(
            TierStats(
                tier="ram",
                pages=len(ram),
                size_bytes=ram.size_bytes,
                hits=hits["ram"],
                misses=misses["ram"],
            )
        )
    if (disk := tiers.disk) is not None:
        found.append(
            TierStats(
                tier="disk",
                state=disk.state,
                why=disk.why_off,
                pages=len(disk),
                size_bytes=disk.size_bytes,
                hits=hits["disk"],
                misses=misses["disk"],
                written=disk.written,
                dropped=disk.dropped,
                damaged=disk.damaged,
            )
        )
    return found


def fingerprint(model: EngineModel, pool: KVPool) -> bytes:
    """Everything that keys and values depend on besides tokens, and how they lie; 32 bytes."""
    layout = pool.layout
    shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.page_size)
    machine = (describe().partition(",")[0], torch.__version__)
    digest = hashlib.sha256(repr((model.facts.fingerprint, shape, layout.dtype, machine)).encode())
    for room in ("kernels", "models", "weights"):  # other code may give other bits
        folder = Path(__file__).parents[1] / room
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so")):
            digest.update(path.read_bytes())
    return digest.digest()


def _store(
    config: EngineConfig, folder: str, namespace: bytes, pool: KVPool, files: Files | None
) -> Callable[[], SegmentStore]:
    """Makes the configured store."""
    layout, bound = pool.layout, config.kv_disk_mib << 20
    slots = max(1, min(SEGMENT_BYTES, bound // 8) // layout.page_bytes)
    form = SegmentForm(namespace, layout.page_size, layout.page_bytes, min(slots, MOST_SLOTS))
    if form.file_bytes > bound:
        raise ConfigError(
            f"A KV page of this model takes {layout.page_bytes >> 10} KiB; kv_disk_mib must be "
            f"at least {(form.file_bytes >> 20) + 1}, got {config.kv_disk_mib}.",
            param="kv_disk_mib",
        )
    return partial(
        SegmentStore,
        Path(folder).expanduser(),
        form,
        bound_bytes=bound,
        max_age_s=config.kv_disk_hours * 3600.0,
        files=files,
    )
