"""The bundled model in the shape of a 0.5B one: real costs, its own answers."""

from __future__ import annotations

from pathlib import Path

from coppice.models.locate import BUNDLED, locate
from tools.make_model import SHAPES
from tools.peers import places
from tools.widen import widen


def wide_target() -> Path:
    """Its folder, made the first time."""
    folder = places.ROOT / "models" / "bundled-in-0.5b"
    if not (folder / "model.safetensors").exists():
        widen(locate(BUNDLED), SHAPES["qwen2.5-0.5b"], folder)
    return folder
