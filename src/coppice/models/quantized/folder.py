"""Writing a quantized checkpoint: tensors in shards, configuration and tokenizer beside them.

The layout is that of compressed-tensors, so that other engines read the folder too: 4-bit
codes packed eight to an int32 (``pack-quantized``), 8-bit codes as int8 (``int-quantized``),
or packed four to an int32 where activations stay floats. Everything else is copied as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from coppice.errors import ConfigError
from coppice.kernels.formats import Format, Quantized
from coppice.weights.names import Scheme
from coppice.weights.packing import pack

SHARD_BYTES = 2 << 30

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
_LEFT = ("config.json", "model.safetensors.index.json", "quantize_config.json")


def compressed(name: str, rows: Quantized, fmt: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that stand for the linear weight ``name`` (``x.weight``).

    Args:
        name: the float tensor's name.
        rows: its codes; symmetric.
        fmt: the format of ``rows``.
        dtype: type of the stored scales, which must hold them without loss.
    """
    base = name.removesuffix("weight")
    tensors = {f"{base}weight_scale": rows.scales.to(dtype)}
    if fmt.bits == 8 and fmt.activations == "int8":  # noqa: PLR2004
        return {f"{base}weight": rows.codes, **tensors}
    return {
        f"{base}weight_packed": pack(rows.codes.short() + (1 << (fmt.bits - 1)), fmt.bits),
        f"{base}weight_shape": torch.tensor(rows.codes.shape),
        **tensors,
    }


def quantization_config(scheme: Scheme, ignored: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` object of compressed-tensors."""
    fmt = scheme.layers
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if fmt.group else "channel",
        "group_size": fmt.group or None,
        "dynamic": False,
    }
    rows = None
    whole = fmt.bits == 8 and fmt.activations == "int8"  # noqa: PLR2004
    if whole:  # 4-bit weights with int8 rows have no layout others read: they say weight-only
        rows = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    layout = "int-quantized" if whole else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": rows,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


class FolderWriter:
    """A checkpoint folder that appears under its name only when it is whole.

    Args:
        out: where it goes; must not exist, or be an empty folder.

    Raises:
        ConfigError: ``out`` is taken or cannot be made.
    """

    def __init__(self, out: Path) -> None:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"{out} already exists; name a folder that does not.", param="out")
        self._out = out
        self._partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written: {error.strerror}.", param="out") from error
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor; full shards are written at once and dropped."""
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self, config: dict[str, Any], tokenizer_from: Path) -> None:
        """Write what is left, copy the small files of the source, and show the folder."""
        self._flush()
        names = list(self._shard_names())
        for index, name in enumerate(names):
            (self._partial / f"{index}.shard").rename(self._partial / name)
        if len(names) > 1:
            homes = {t: n for n, found in zip(names, self._shards, strict=True) for t in found}
            self._json(
                "model.safetensors.index.json",
                {"metadata": {"total_size": self._total}, "weight_map": homes},
            )
        for pattern in _COPIED:
            for path in sorted(tokenizer_from.glob(pattern)):
                if path.name not in _LEFT and path.is_file():
                    shutil.copyfile(path, self._partial / path.name)
        self._json("config.json", config)
        mode = (self._partial / "config.json").stat().st_mode & 0o777
        for name in names:  # written by a library that lets only their owner read them
            (self._partial / name).chmod(mode)
        if self._out.exists():
            self._out.rmdir()
        self._partial.rename(self._out)

    def abandon(self) -> None:
        """Remove what was written; harmless after `finish`."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _shard_names(self) -> Iterator[str]:
        count = len(self._shards)
        for index in range(count):
            part = "" if count == 1 else f"-{index + 1:05}-of-{count:05}"
            yield f"model{part}.safetensors"

    def _flush(self) -> None:
        if self._held:
            path = self._partial / f"{len(self._shards)}.shard"
            save_file(self._held, path, {"format": "pt"})
            self._shards.append(list(self._held))
            self._held, self._bytes = {}, 0

    def _json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        (self._partial / name).write_text(text, encoding="utf-8")
