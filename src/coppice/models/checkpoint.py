"""Local checkpoint folders: configuration, index and shards, all checked before use."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.models.fields import short
from coppice.models.quantized.source import NAME_KEY, open_quantized
from coppice.models.safetensors import SafetensorsFile, SafetensorsSource
from coppice.models.source import TensorSource

MAX_JSON_BYTES = 64 << 20
MAX_SHARDS = 10_000

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OLD_GPTQ = "quantize_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint; close ``source`` when done with it.

    Attributes:
        folder: where its files are.
        config: ``config.json`` as parsed, less ``quantization_config``, which ``source`` knows.
        generation: ``generation_config.json`` as parsed, or empty.
        source: its tensors.
    """

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    source: TensorSource


def open_folder(folder: Path) -> Checkpoint:
    """Open a Hugging Face style folder of safetensors.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe.
        UnsupportedModelError: the folder holds weights in another format only.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; name a folder with a whole model.")
    config = read_json(folder / "config.json")
    extra = folder / "generation_config.json"
    generation = read_json(extra) if extra.is_file() else {}
    settings = config.pop("quantization_config", None)
    if settings is None and (folder / _OLD_GPTQ).is_file():
        settings = read_json(folder / _OLD_GPTQ)
    files = open_tensors(folder)
    if settings is None:
        return Checkpoint(folder, config, generation, files)
    try:
        source = open_quantized(files, settings, config.get(NAME_KEY))
    except CheckpointError:
        files.close()
        raise
    return Checkpoint(folder, config, generation, source)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of at most `MAX_JSON_BYTES`.

    Raises:
        CheckpointError: unreadable, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB.")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON ({short(str(error))}).") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} must hold one JSON object.")
    return found


def open_tensors(folder: Path) -> SafetensorsSource:
    """Open the safetensors of ``folder``, one file or shards with an index.

    Raises:
        CheckpointError: no weights, or an index that does not match its shards.
        UnsupportedModelError: only pickled weights.
    """
    if (folder / _SINGLE).exists():
        return _open(folder, [_SINGLE])
    if (folder / _INDEX).exists():
        wanted = _weight_map(folder / _INDEX)
        source = _open(folder, sorted(set(wanted.values())))
        try:
            _compare(wanted, source)
        except CheckpointError:
            source.close()
            raise
        return source
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code and are never "
            "opened; convert them to safetensors first, or use the model's safetensors revision."
        )
    raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}.")


def _open(folder: Path, names: list[str]) -> SafetensorsSource:
    with ExitStack() as undo:
        files = []
        for name in names:
            file = SafetensorsFile(folder / name)
            undo.callback(file.close)
            files.append(file)
        source = SafetensorsSource(files)
        undo.pop_all()
        return source


def _weight_map(path: Path) -> dict[str, str]:
    """The index: tensor name to the name of a file beside it."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path.name} has no 'weight_map' object.")
    files = set()
    for file in found.values():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path.name} names {short(file)}; shards end in .safetensors.")
        files.add(file)
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{path.name} names {len(files)} shards; at most {MAX_SHARDS}.")
    for file in sorted(files):
        if Path(file).name != file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path.name} names {short(file)}; shards must lie in the folder itself."
            )
        if not (path.parent / file).is_file():
            raise CheckpointError(
                f"{path.name} names {short(file)}, which is not there; the download is "
                "incomplete: fetch the missing shard."
            )
    return found


def _compare(wanted: dict[str, str], source: SafetensorsSource) -> None:
    """Every tensor is in the shard the index says, and nothing else is."""
    present = source.homes()
    for name, file in wanted.items():
        if present.get(name) != file:
            raise CheckpointError(f"{_INDEX} puts tensor {short(name)} in {file}; it is not there.")
    extra = sorted(present.keys() - wanted.keys())
    if extra:
        raise CheckpointError(f"{present[extra[0]]} holds {short(extra[0])}, not in {_INDEX}.")
