"""Where a model's files lie; no torch here, since the HTTP process asks too."""

from __future__ import annotations

from pathlib import Path

from coppice.errors import CheckpointError
from coppice.models import hub

BUNDLED = "bundled"
BUNDLED_DRAFT = "bundled-draft"
_FOLDERS = {BUNDLED: "target", BUNDLED_DRAFT: "draft"}


def locate(model: str | Path) -> Path:
    """The folder or GGUF file a model name stands for, fetched from the hub if need be.

    Raises:
        CheckpointError: there is no such thing.
    """
    if isinstance(model, str) and model in _FOLDERS:
        return Path(__file__).parent / "bundled" / _FOLDERS[model]
    path = Path(model).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; name its folder, or a .gguf file.")
    if isinstance(model, str) and hub.is_hub_id(model):
        return hub.fetch(model)
    raise CheckpointError(
        f"There is no model at {str(model)!r}; name a folder, a .gguf file, a hub id such as "
        f"'Qwen/Qwen2.5-0.5B-Instruct', or {BUNDLED!r}."
    )
