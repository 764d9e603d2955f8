"""What one start leaves for the next: where the packed weights of a configuration lie.

Which pack a model needs follows from its checkpoint and the kernels, and is known only when
PyTorch is there. The note a start leaves is a guess at it, by which the next one reads the
pack while PyTorch is imported. A wrong guess costs the reading: the loader asks for the right
pack by its key.
"""

from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from coppice.engine.config import EngineConfig
from coppice.weights.stored import StoredPack, load_pack

_log = logging.getLogger(__name__)


def begin_reading(config: EngineConfig) -> Future[StoredPack] | None:
    """Read the pack of the last start with this configuration, in a thread of its own."""
    try:
        note = json.loads(_note(config).read_bytes())
        path, key = config.cache_folder / "packs" / Path(note["pack"]).name, str(note["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
    try:
        return pool.submit(load_pack, path, key)
    finally:
        pool.shutdown(wait=False)


def remember(config: EngineConfig, pack: tuple[Path, str] | None) -> None:
    """Leave a note for `begin_reading`, where there is a pack and none says the same."""
    if pack is None:
        return
    path, text = _note(config), json.dumps({"pack": pack[0].name, "key": pack[1]})
    try:
        if path.is_file() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)
    except (OSError, ValueError) as error:
        _log.warning("The next start will not be told where its weights are: %s", error)


def _note(config: EngineConfig) -> Path:
    """Where the note of a configuration lies."""
    parts = [str(Path(config.model).absolute()), config.dtype, config.quantization]
    parts += [] if config.adapter is None else [str(Path(config.adapter).absolute())]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return config.cache_folder / "starts" / f"{name}.json"
