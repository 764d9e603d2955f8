"""Operators to time: ours and PyTorch's, with what each has to read and compute."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coppice.errors import EngineError
from coppice.kernels.formats import BF16, Format, Quantized
from coppice.kernels.interface import Ops
from coppice.kernels.pages import page_shape, write_keys, write_values
from coppice.kernels.rows import Rows

FORMATS = {
    "bf16": BF16,
    "int8": Format(name="int8", bits=8, activations="int8"),
    "int4": Format(name="int4-g64", bits=4, group=64, activations="int8"),
}
BEYOND_CACHE_BYTES = 192 << 20
"""Weights are cycled over copies of this size together, so that no cache holds them."""

SLOW_S = 0.5

LINEARS = {
    "0.5B down": (896, 4864),
    "0.5B gate+up": (9728, 896),
    "1B gate+up": (16384, 2048),
    "1B down": (2048, 8192),
}
QUICK_LINEARS = ("0.5B down", "1B gate+up")
CONTEXT, CHUNK, PAGE = 8192, 512, 32
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
"""Those of Llama-3.2-1B."""


@dataclass(frozen=True)
class Operator:
    """One thing to time.

    Attributes:
        name: of the operator and its size.
        form: of the weights or pages.
        rows: it works on.
        size_bytes: of weights or pages it must read, at least.
        ops: multiplications and additions.
        ours: Coppice's call; ``None`` where it is not built, then ``note`` says so.
        peers: PyTorch's calls by name, the fastest of which counts.
    """

    name: str
    form: str
    rows: int
    size_bytes: float
    ops: float
    ours: Callable[[], object] | None
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    note: str = ""


def seconds_of(call: Callable[[], object], *, least_s: float = 0.02, samples: int = 5) -> float:
    """Median seconds of a call, each sample long enough for the clock; one of a slow call."""
    call()
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    if first > SLOW_S:
        return first
    repeats = max(1, math.ceil(least_s / max(1e-7, first)))
    found = []
    for _ in range(samples if repeats > 1 else 3):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        found.append((time.perf_counter() - began) / repeats)
    return statistics.median(found)


def linears(
    ops: Ops, form: str, rows: list[int], names: Iterable[str] = tuple(LINEARS)
) -> Iterator[Operator]:
    """The named shapes at every number of rows, in one format."""
    for name in names:
        n, k = LINEARS[name]
        source = _source(FORMATS[form], n, k)
        weights, note = _pack_copies(ops, FORMATS[form], source, (n, k))
        size = weights[0].nbytes if weights else n * k * FORMATS[form].bits / 8
        others = _torch_copies(form, source)
        for count in rows:
            x = torch.randn(count, k)
            yield Operator(
                f"linear {name} {n}x{k}",
                form,
                count,
                float(size),
                2.0 * count * n * k,
                _over(weights, lambda w, x=x: ops.linear(x, w)) if weights else None,
                {key: _over(copies, _torch_call(key, x)) for key, copies in others.items()},
                note,
            )


def _over(copies: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Call with the next copy each time."""
    turn = cycle(copies)
    return lambda: call(next(turn))


def _copies(size_bytes: float) -> int:
    return max(1, math.ceil(BEYOND_CACHE_BYTES / size_bytes))


def _source(format: Format, n: int, k: int) -> Tensor | Quantized:
    """A weight both sides are given."""
    if not format.quantized:
        return torch.randn(n, k).to(torch.bfloat16)
    low, high = (-127, 128) if format.bits == 8 else (-8, 8)
    codes = torch.randint(low, high, (n, k), dtype=torch.int8)
    scales = torch.rand(n, format.num_groups(k)) * 0.01 + 0.001
    return Quantized(codes, scales.to(torch.bfloat16).float())


def _pack_copies(
    ops: Ops, format: Format, source: Tensor | Quantized, shape: tuple[int, int]
) -> tuple[list[Any], str]:
    """Enough packed copies to lie beyond the cache; none and the reason if it is not built."""
    made = []
    try:
        for _ in range(_copies(math.prod(shape) * format.bits / 8)):
            packed = ops.empty_linear(*shape, format)
            ops.fill_linear(packed, 0, source)
            made.append(packed)
    except EngineError as error:
        return [], error.message
    return made, ""


def _torch_copies(form: str, source: Tensor | Quantized) -> dict[str, list[Any]]:
    """The same for PyTorch: plain matrices, or what its quantized operators prepack."""
    if not isinstance(source, Quantized):
        count = _copies(source.nbytes)
        return {
            "bf16": [source.clone() for _ in range(count)],
            "float32": [source.float() for _ in range(max(1, count // 2))],
        }
    codes, scales, _ = source
    count = _copies(codes.numel() * FORMATS[form].bits / 8)
    if form == "int8":
        zeros = torch.zeros(len(codes), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(codes, scales[:, 0], zeros, 0)
        prepack = torch.ops.quantized.linear_prepack
        return {"linear_dynamic": [prepack(weight, None) for _ in range(count)]}
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).to(torch.bfloat16)
    return {"int4pack_mm": [(packed.clone(), pairs.contiguous()) for _ in range(count)]}


def _torch_call(key: str, x: Tensor) -> Callable[[Any], object]:
    if key == "linear_dynamic":
        # 7-bit activations: with 8 its sums overflow on processors without VNNI
        return lambda w: torch.ops.quantized.linear_dynamic(x, w, reduce_range=True)
    half = x.to(torch.bfloat16)
    if key == "int4pack_mm":
        return lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(half, w[0], 64, w[1])
    return (lambda w: F.linear(half, w)) if key == "bf16" else (lambda w: F.linear(x, w))


def attentions(ops: Ops) -> Iterator[Operator]:
    """One row, and a chunk of a prompt, at the end of a context of 8k tokens."""
    pages = CONTEXT // PAGE
    shape = page_shape(pages, KV_HEADS, PAGE, HEAD_DIM, torch.bfloat16)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    flat = [torch.randn(CONTEXT, KV_HEADS, HEAD_DIM).to(torch.bfloat16) for _ in range(2)]
    place = torch.arange(CONTEXT)
    write_keys(k, place // PAGE, place % PAGE, flat[0])
    write_values(v, place // PAGE, place % PAGE, flat[1])
    flat = [t.transpose(0, 1) for t in flat]  # [KV heads, tokens, head dim]
    for name, rows in (("decode", 1), ("prefill", CHUNK)):
        q = torch.randn(rows, HEADS, HEAD_DIM)
        batch = Rows.chunk([0] * rows, list(range(pages)), CONTEXT - rows)
        seen = rows * (CONTEXT - rows) + rows * (rows + 1) / 2
        yield Operator(
            f"attention {name} at 8k",
            "bf16",
            rows,
            float(k.nbytes + v.nbytes),
            4.0 * seen * HEADS * HEAD_DIM,
            lambda q=q, batch=batch: ops.attention(q, batch, k, v, scale=HEAD_DIM**-0.5),
            {
                str(dtype).removeprefix("torch."): _sdpa(q, *flat, dtype)
                for dtype in (torch.bfloat16, torch.float32)
            },
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """PyTorch's attention over contiguous keys and values, unmasked: a little more work."""
    # [1, heads, tokens, head_dim]
    q, k, v = (t.to(dtype).contiguous()[None] for t in (q.transpose(0, 1), k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def small_ones(ops: Ops) -> Iterator[Operator]:
    """What surrounds the matrices, at one row and at a full step of rows."""
    width = 2048
    weight = torch.rand(width)
    for rows in (1, 512):
        x = torch.randn(rows, width)
        gate_up = torch.randn(rows, 2 * 8192)
        yield Operator(
            "rms_norm 2048",
            "float32",
            rows,
            8.0 * x.numel(),
            4.0 * x.numel(),
            lambda x=x: ops.rms_norm(x, weight, eps=1e-5),
            {"rms_norm": lambda x=x: F.rms_norm(x, (width,), weight, 1e-5)},
        )
        yield Operator(
            "silu(gate) * up 8192",
            "float32",
            rows,
            6.0 * gate_up.numel(),
            4.0 * gate_up.numel(),
            lambda g=gate_up: ops.gated_activation(g, "silu"),
            {"silu, mul": lambda g=gate_up: F.silu(g[:, :8192]) * g[:, 8192:]},
        )
