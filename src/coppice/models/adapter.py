"""LoRA adapters, added to the matrices they belong to as these are read.

An adapter holds two thin factors for some matrices of its base model; with them the layer
computes ``(W + s·B·A)·x`` (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022). Added once at load, an adapter costs nothing per token and goes through every
format and kernel like any other weight; the files are read as the PEFT library writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coppice.errors import CheckpointError, UnsupportedModelError
from coppice.kernels.formats import Format
from coppice.models.checkpoint import read_json
from coppice.models.fields import Fields, short
from coppice.models.safetensors import SafetensorsFile, SafetensorsSource
from coppice.models.source import Codes, TensorSource

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": ([],),
    "alpha_pattern": ({},),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
}
"""Settings that change what is computed, with the values (besides null) that change nothing."""


class Factors(NamedTuple):
    """Names of the two factors of one matrix: ``down [r, in]`` and ``up [out, r]``."""

    down: str
    up: str


class Adapter:
    """An opened adapter folder; close it when its matrices have been read.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: a file is missing, damaged or contradictory.
        UnsupportedModelError: another kind of adapter, or a setting of it that is not built.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self._config = read_json(folder / "adapter_config.json")
        self._rank, self._scale = _read_config(self._config)
        self._files = SafetensorsSource([SafetensorsFile(folder / "adapter_model.safetensors")])
        try:
            self.factors = self._pair()
        except CheckpointError:
            self.close()
            raise

    def check(self, base: TensorSource) -> None:
        """Refuse an adapter that does not fit a model.

        Raises:
            CheckpointError: it changes a matrix the model does not have in that shape.
            UnsupportedModelError: it changes a matrix that is stored as integers.
        """
        names = set(base.names())
        for name, (down, up) in self.factors.items():
            if name not in names:
                raise CheckpointError(
                    f"The adapter {self.name} changes {short(name)}, which the model does not "
                    "have; it belongs to another model."
                )
            shape = (self._files.shape(up)[0], self._files.shape(down)[1])
            if base.shape(name) != shape:
                raise CheckpointError(
                    f"The adapter {self.name} changes {short(name)} as {shape}; in the model it "
                    f"is {base.shape(name)}. It belongs to another model."
                )
            if base.stored_format(name) is not None:
                raise UnsupportedModelError(
                    f"{short(name)} is stored as integers, to which an adapter cannot be added "
                    "without loss; give it to the model in floats and quantize that as it is read."
                )

    def change(self, name: str) -> Tensor:
        """Float32 ``[out, in]``: what is added to the matrix ``name``."""
        down, up = (self._files.read(factor, torch.float32) for factor in self.factors[name])
        return up.mul_(self._scale) @ down

    def fingerprint(self) -> str:
        """A hex digest of settings, shapes and sampled content."""
        text = json.dumps(self._config, sort_keys=True) + self._files.fingerprint()
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Close its file."""
        self._files.close()

    def _pair(self) -> dict[str, Factors]:
        """The factors of each matrix, by the matrix' name in the model."""
        names = set(self._files.names())
        found = {}
        for down in sorted(name for name in names if name.endswith(_DOWN)):
            stem = down.removesuffix(_DOWN)
            up = stem + _UP
            if up in names:
                self._check_shapes(down, up)
                found[stem.removeprefix(_PREFIX) + ".weight"] = Factors(down, up)
        unpaired = names - {name for pair in found.values() for name in pair}
        if unpaired:
            raise UnsupportedModelError(
                f"The adapter {self.name} holds {short(min(unpaired))}; only pairs of factors "
                f"(x{_DOWN}, x{_UP}) are supported."
            )
        if not found:
            raise CheckpointError(f"The adapter {self.name} holds no factors.")
        return found

    def _check_shapes(self, down: str, up: str) -> None:
        a, b = self._files.shape(down), self._files.shape(up)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == self._rank:  # noqa: PLR2004
            raise CheckpointError(
                f"The adapter {self.name} has factors of shapes {a} and {b} for {short(down)}; "
                f"its settings say rank {self._rank}."
            )


class AdaptedSource:
    """A checkpoint with an adapter added (see `coppice.models.source`).

    Args:
        base: the checkpoint.
        adapter: checked against it; closed with it.
    """

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        adapter.check(base)
        self._base = base
        self._adapter = adapter
        self.format = base.format

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``."""
        return self._base.shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``; the sum is made in float32 and rounded once."""
        if name not in self._adapter.factors:
            return self._base.read(name, dtype)
        change = self._adapter.change(name)
        return change.add_(self._base.read(name, torch.float32)).to(dtype)

    def stored_format(self, name: str) -> Format | None:
        """As in the checkpoint: what an adapter changes is stored as floats."""
        return self._base.stored_format(name)

    def read_codes(self, name: str) -> Codes:
        """As in the checkpoint."""
        return self._base.read_codes(name)

    def release(self, name: str) -> None:
        """Say that ``name`` was consumed."""
        self._base.release(name)

    def native_dtype(self) -> torch.dtype:
        """The checkpoint's own."""
        return self._base.native_dtype()

    def fingerprint(self) -> str:
        """Of the checkpoint and the adapter."""
        text = self._base.fingerprint() + self._adapter.fingerprint()
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """Close both."""
        self._adapter.close()
        self._base.close()


def _read_config(config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scale.

    Raises:
        CheckpointError: they are missing or no numbers.
        UnsupportedModelError: a setting that is not built.
    """
    fields = Fields(config, where="adapter_config.json")
    fields.choice("peft_type", {"LORA": None})
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        if value is not None and not any(value == n and type(value) is type(n) for n in neutral):
            raise UnsupportedModelError(
                f"adapter_config.json sets {key!r} to {short(value)}, which is not supported."
            )
    rank = fields.integer("r")
    alpha = fields.number("lora_alpha", positive=False)
    return rank, alpha / (math.sqrt(rank) if fields.flag("use_rslora") else rank)
