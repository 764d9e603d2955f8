"""The layout of KV pages: what lies where, for everyone but the native kernels (`native/kv.h`).

A page holds groups of `LANES` keys of one KV head. A group of K has a dim per line and a key
per column; a group of V is panels of `LANES` dims, each with a key per line and a dim per
column. Attention reads both as they lie, with a lane per logit and a lane per dim. The head
dim is padded to whole panels. In bfloat16 the columns of a line are in packed order, see
docs/internals/kernels.md. In int8 the last `SCALE_LINES` lines of a group are its keys' scales,
float32: a head of a key or value is stored as ``round(x / scale)``, the scale being its largest
size over 127.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coppice.errors import EngineError
from coppice.kernels import native_available

LANES = 16
"""Keys of a group, and columns of a line; a page holds a multiple of it."""

HUGE_BYTES = 4 << 20
"""Pages of a layer that take at least this much ask the system for huge pages."""

SCALE_LINES = 4
"""Lines of an int8 group that hold its scales."""

SMALLEST = 1e-30
"""A head none of whose values is as large is stored as zeros in int8."""


def page_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    """Shape of one layer's K pages, and of its V pages: ``[P, K, groups, lines, LANES]``.

    There are as many lines as dims, padded, and in int8 those of the scales.

    Raises:
        EngineError: pages are not whole groups.
    """
    if page_size < 1 or page_size % LANES:
        raise EngineError(f"A KV page holds a multiple of {LANES} tokens, not {page_size}.")
    lines = -(-head_dim // LANES) * LANES + _scale_lines(dtype)
    return num_pages, num_kv_heads, page_size // LANES, lines, LANES


def empty_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for pages, touched as they are written.

    In huge pages where the system has them: a step reads every page of a sequence, in any order,
    and looking up small ones costs as much as reading them.
    """
    pages = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and pages.nbytes >= HUGE_BYTES and native_available():
        from coppice.kernels import _native

        _native.advise_huge(pages.data_ptr(), pages.nbytes)
    return pages


def give_back_pages(pages: Tensor, free: Sequence[int]) -> None:
    """Let the system have the memory of free pages; they are zeros when they are used again.

    Args:
        pages: ``[N, P, ...]``, the pages of N layers, as `empty_pages` made them.
        free: pages whose bytes nobody wants, ascending.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or pages.device.type != "cpu":
        return
    page_bytes, unit = pages[0, 0].nbytes, mmap.PAGESIZE
    for layer in pages:
        for first, last in _runs(free):
            begin = -(-(layer.data_ptr() + first * page_bytes) // unit) * unit
            end = (layer.data_ptr() + (last + 1) * page_bytes) // unit * unit
            if end > begin:
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of ascending numbers without a gap."""
    for _, run in itertools.groupby(enumerate(numbers), lambda each: each[1] - each[0]):
        found = [number for _, number in run]
        yield found[0], found[-1]


def page_size_of(pages: Tensor) -> int:
    """Tokens a page."""
    return pages.shape[2] * LANES


def write_keys(pages: Tensor, page: Tensor, offset: Tensor, k: Tensor) -> None:
    """Store ``k [n, K, D]`` at ``offset [n]`` of ``page [n]``."""
    column = _columns(pages)[offset % LANES]
    pages[page, :, offset // LANES, : k.shape[2], column] = _store(pages, page, offset, k)


def read_keys(pages: Tensor, page: Tensor, offset: Tensor, head_dim: int) -> Tensor:
    """The keys at ``offset [n]`` of ``page [n]`` as ``[n, K, D]`` float32."""
    column = _columns(pages)[offset % LANES]
    stored = pages[page, :, offset // LANES, :head_dim, column].float()
    return stored * _scale_of(pages, page, offset)


def write_values(pages: Tensor, page: Tensor, offset: Tensor, v: Tensor) -> None:
    """Store ``v [n, K, D]`` at ``offset [n]`` of ``page [n]``."""
    panels = _panels(pages)
    room = panels.shape[3] * LANES - v.shape[2]
    stored = torch.nn.functional.pad(_store(pages, page, offset, v), (0, room))
    stored = torch.unflatten(stored, 2, (-1, LANES))  # [n, K, padded D / LANES, LANES]
    lines = torch.empty_like(stored)
    lines[..., _columns(pages)] = stored
    panels[page, :, offset // LANES, :, offset % LANES] = lines


def read_values(pages: Tensor, page: Tensor, offset: Tensor, head_dim: int) -> Tensor:
    """The values at ``offset [n]`` of ``page [n]`` as ``[n, K, D]`` float32."""
    lines = _panels(pages)[page, :, offset // LANES, :, offset % LANES]
    stored = lines[..., _columns(pages)].flatten(2)[..., :head_dim].float()
    return stored * _scale_of(pages, page, offset)


def move_keys(pages: Tensor, to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> None:
    """Copy keys from ``(page [n], offset [n])`` to others, all read before any is written."""
    (to_page, to_at), (page, at) = to, source
    columns, dims = _columns(pages), _dims(pages)
    lines = pages[page, :, at // LANES, :dims, columns[at % LANES]]  # [n, K, padded D]
    pages[to_page, :, to_at // LANES, :dims, columns[to_at % LANES]] = lines
    _move_scales(pages, to, source)


def move_values(pages: Tensor, to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> None:
    """Copy values likewise."""
    (to_page, to_at), (page, at) = to, source
    panels = _panels(pages)
    lines = panels[page, :, at // LANES, :, at % LANES]  # [n, K, padded D / LANES, LANES]
    panels[to_page, :, to_at // LANES, :, to_at % LANES] = lines
    _move_scales(pages, to, source)


def _scale_lines(dtype: torch.dtype) -> int:
    return SCALE_LINES if dtype == torch.int8 else 0


def _dims(pages: Tensor) -> int:
    """The head dim in whole panels."""
    return pages.shape[3] - _scale_lines(pages.dtype)


def _panels(pages: Tensor) -> Tensor:
    """V pages as ``[P, K, groups, padded D / LANES, key, column]``."""
    return torch.unflatten(pages[:, :, :, : _dims(pages)], 3, (-1, LANES))


def _scale_of(pages: Tensor, page: Tensor, offset: Tensor) -> Tensor | float:
    """What the stored numbers are multiplied by: ``[n, K, 1]``, or 1."""
    if pages.dtype != torch.int8:
        return 1.0
    groups = pages[page, :, offset // LANES, -SCALE_LINES:]  # [n, K, SCALE_LINES, LANES]
    scales = groups.flatten(2).view(torch.float32)  # [n, K, LANES]
    return scales[torch.arange(len(offset)), :, offset % LANES, None]


def _store(pages: Tensor, page: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    """``x [n, K, D]`` in the pages' type; the scales of int8 are written."""
    if pages.dtype != torch.int8:
        return x.to(pages.dtype)
    most = x.abs().amax(-1)  # [n, K]
    some = most >= SMALLEST
    inverse = torch.where(some, 127.0 / most, 0.0)
    sound = torch.isfinite(x).all(-1)
    scales = torch.where(sound, torch.where(some, most / 127.0, 0.0), torch.nan)
    _put_scales(pages, page, offset, scales)
    return torch.where(sound[..., None], (x * inverse[..., None]).round(), 0).to(torch.int8)


def _put_scales(pages: Tensor, page: Tensor, offset: Tensor, scales: Tensor) -> None:
    """Write ``scales [n, K]`` one byte line at a time (a float32 view of a slice is a copy)."""
    octets = scales.contiguous().view(torch.int8).reshape(*scales.shape, 4)  # [n, K, 4]
    at = offset % LANES * 4
    for i in range(4):
        line, column = _dims(pages) + (at + i) // LANES, (at + i) % LANES
        pages[page, :, offset // LANES, line, column] = octets[..., i]


def _move_scales(pages: Tensor, to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> None:
    if pages.dtype == torch.int8:
        scales = _scale_of(pages, *source)
        assert isinstance(scales, Tensor)
        _put_scales(pages, *to, scales[..., 0])


def _columns(pages: Tensor) -> Tensor:
    """Where in a line each of the `LANES` lanes lies."""
    lanes = torch.arange(LANES, device=pages.device)
    if pages.dtype != torch.bfloat16:
        return lanes
    return lanes % 8 * 2 + lanes // 8
