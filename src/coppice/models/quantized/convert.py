"""``coppice quantize``: from a float checkpoint to a quantized one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coppice.errors import ConfigError
from coppice.kernels import get_ops
from coppice.kernels.formats import BF16, F32, Quantized
from coppice.kernels.interface import Ops
from coppice.models.build import build_weights
from coppice.models.checkpoint import Checkpoint, open_folder
from coppice.models.config import ModelConfig
from coppice.models.decoder import Decoder
from coppice.models.locate import locate
from coppice.models.plan import LayerPlan, Stack, check_plan, plan_of
from coppice.models.quantized.calibrate import Calibration, QuantizedLayer
from coppice.models.quantized.folder import (
    FolderWriter,
    compressed,
    quantization_config,
)
from coppice.models.quantized.layer import Method
from coppice.models.quantized.source import NAME_KEY
from coppice.models.registry import read_config
from coppice.models.safetensors import SafetensorsSource
from coppice.models.tokenizer import Tokenizer
from coppice.weights.names import Scheme
from coppice.weights.rounding import check_width, round_to_nearest

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which part of a calibration text is used.

    Attributes:
        sequences: windows taken, evenly over the text.
        length: tokens of each, at most the model's context.
    """

    sequences: int = 64
    length: int = 512


def quantize_folder(
    model: str | Path,
    out: Path,
    scheme: Scheme,
    *,
    method: Method = "rtn",
    text: str | None = None,
    sampling: Sampling | None = None,
    ops: Ops | None = None,
    progress: Progress | None = None,
) -> Path:
    """Quantize the checkpoint ``model`` and write it to the new folder ``out``.

    Args:
        model: a folder of float safetensors, ``"bundled"``, or a hub id.
        out: must not exist, or be empty. Nothing is left there on failure.
        scheme: which formats.
        method: ``"gptq"`` and ``"awq"`` need a calibration text; ``"rtn"`` can use one to weigh
            errors at 4 bits.
        text: what the model is to be good at, some hundred kilobytes of it.
        sampling: how much of the text is used.
        ops: who computes the layers while calibrating; by default the fastest.
        progress: called after each layer.

    Raises:
        ConfigError: the text is missing or too short, ``out`` is taken.
        CheckpointError: the model cannot be read, or its widths do not fit the format.
    """
    path = locate(model)
    if path.suffix == ".gguf":
        raise ConfigError("Quantizing starts from a folder of safetensors, not from a GGUF file.")
    if method != "rtn" and text is None:
        raise ConfigError(
            f"{method} calibrates on text: give --calibration FILE, some hundred kilobytes of "
            "what the model will read; or choose --method rtn.",
            param="calibration",
        )
    checkpoint = open_folder(path)
    writer: FolderWriter | None = None
    try:
        job = _Job(checkpoint, scheme)
        writer = FolderWriter(out)
        eight = scheme.layers.bits == 8  # noqa: PLR2004 - rounding has nothing to learn there
        if text is None or (method == "rtn" and eight):
            layers = job.rounded()
        else:
            tokenizer = Tokenizer.from_folder(path)
            texts = sample_text(tokenizer, text, job.config, sampling or Sampling())
            layers = job.calibration(method, ops or get_ops()).run(texts)
        job.write(writer, _counted(layers, len(job.plan.layers), progress))
    finally:
        checkpoint.source.close()
        if writer is not None:
            writer.abandon()
    return out


def _counted(
    layers: Iterator[QuantizedLayer], total: int, progress: Progress | None
) -> Iterator[QuantizedLayer]:
    for done, layer in enumerate(layers, 1):
        yield layer
        if progress is not None:
            progress(done, total)


def sample_text(
    tokenizer: Tokenizer, text: str, config: ModelConfig, sampling: Sampling
) -> list[list[int]]:
    """Windows of tokens, evenly over ``text``.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    length = min(sampling.length, config.max_position)
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = len(ids) // length
    if not windows:
        raise ConfigError(
            f"The calibration text has {len(ids)} tokens, less than one sequence of {length}; "
            "give some hundred kilobytes of text.",
            param="calibration",
        )
    count = min(sampling.sequences, windows)
    starts = [i * windows // count * length for i in range(count)]
    return [list(ids[start : start + length]) for start in starts]


class _Job:
    """One checkpoint on its way to one scheme, checked before anything is computed."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme) -> None:
        source = checkpoint.source
        if not isinstance(source, SafetensorsSource):
            raise ConfigError(
                f"{checkpoint.folder} is quantized already ({source.format}); start from the "
                "float checkpoint it was made of."
            )
        self.config = read_config(checkpoint.config)
        self.plan = plan_of(self.config, source)
        check_plan(self.plan, source)
        self._source = source
        self._checkpoint = checkpoint
        self._scheme = scheme
        # Scales in the checkpoint's own precision, as other engines expect them.
        native = source.native_dtype()
        self._scale_dtype = torch.bfloat16 if native == torch.bfloat16 else torch.float16
        for layer in self.plan.layers:
            for stack in _matrices(layer):
                check_width(stack.name, stack.in_features, scheme.layers)

    def rounded(self) -> Iterator[QuantizedLayer]:
        """Every layer rounded to nearest, one matrix in memory at a time."""
        for layer in self.plan.layers:
            matrices = []
            for stack in _matrices(layer):
                rows = round_to_nearest(
                    torch.cat([self._read(name, stack) for name, _ in stack.parts]),
                    self._scheme.layers,
                    name=stack.name,
                    scale_dtype=self._scale_dtype,
                )
                matrices.append((stack, rows))
            yield QuantizedLayer(matrices, {})

    def _read(self, name: str, stack: Stack) -> Tensor:
        tensor = self._source.read(name, torch.float32)
        return tensor if stack.expert is None else tensor[stack.expert]

    def calibration(self, method: Method, ops: Ops) -> Calibration:
        """The float model, ready to be quantized layer by layer."""
        fmt = BF16 if self._source.native_dtype() == torch.bfloat16 else F32
        weights = build_weights(self.config, self._source, ops, format=fmt)
        return Calibration(
            Decoder(self.config, weights, ops),
            self.plan,
            self._source,
            fmt=self._scheme.layers,
            method=method,
            scale_dtype=self._scale_dtype,
        )

    def write(self, writer: FolderWriter, layers: Iterator[QuantizedLayer]) -> None:
        """Quantized matrices layer by layer, then all tensors no layer has changed."""
        done: set[str] = set()
        for layer in layers:
            for stack, rows in layer.matrices:
                for name, part in self._parts(stack, rows):
                    made = compressed(name, part, self._scheme.layers, self._scale_dtype)
                    for key, tensor in made.items():
                        writer.add(key, tensor)
                done.update(name for name, _ in stack.parts)
            for name, tensor in layer.floats.items():  # in float32: rounding would undo a part
                writer.add(name, tensor)
                done.add(name)
        for name in self._source.names():
            if name not in done:
                writer.add(name, self._source.read_stored(name))
        routers = [layer.router for layer in self.plan.layers if layer.router is not None]
        kept = [name.removesuffix(".weight") for router in routers for name, _ in router.parts]
        config = {
            **self._checkpoint.config,
            "quantization_config": quantization_config(self._scheme, ["lm_head", *kept]),
            NAME_KEY: self._scheme.name,
        }
        writer.finish(config, self._checkpoint.folder)

    def _parts(self, stack: Stack, rows: Quantized) -> Iterator[tuple[str, Quantized]]:
        """The rows of each checkpoint tensor; fused experts come apart, as others expect."""
        names = stack.parts
        if stack.expert is not None:
            experts = self.config.experts
            assert experts is not None, "a layer with experts needs their specification"
            ((fused, count),) = stack.parts
            at, _, last = fused.rpartition(".")
            parts = (experts.gate, experts.up) if last == "gate_up_proj" else (experts.down,)
            size = count // len(parts)
            names = tuple((f"{at}.{stack.expert}.{part}.weight", size) for part in parts)
        first = 0
        for name, count in names:
            span = slice(first, first + count)
            yield name, Quantized(rows.codes[span], rows.scales[span])
            first += count


def _matrices(layer: LayerPlan) -> Iterator[Stack]:
    """The matrices that are quantized: all of a layer's but the router."""
    return (stack for stack in layer.stacks() if stack is not layer.router)
