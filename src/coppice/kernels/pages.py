"""The layout of KV pages: what lies where, for everyone but the native kernels (`native/kv.h`).

A page holds groups of `LANES` keys of one KV head. A group of K has a dim per line and a key
per column; a group of V is panels of `LANES` dims, each with a key per line and a dim per
column. Attention reads both as they lie, with a lane per logit and a lane per dim. The head
dim is padded to whole panels. In bfloat16 the columns of a line are in packed order, see
docs/internals/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.errors import EngineError

LANES = 16
"""Keys of a group, and columns of a line; a page holds a multiple of it."""


def page_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int
) -> tuple[int, int, int, int, int]:
    """Shape of one layer's K pages, and of its V pages: ``[P, K, groups, padded D, LANES]``.

    Raises:
        EngineError: pages are not whole groups.
    """
    if page_size < 1 or page_size % LANES:
        raise EngineError(f"A KV page holds a multiple of {LANES} tokens, not {page_size}.")
    return num_pages, num_kv_heads, page_size // LANES, -(-head_dim // LANES) * LANES, LANES


def page_size_of(pages: Tensor) -> int:
    """Tokens a page."""
    return pages.shape[2] * LANES


def write_keys(pages: Tensor, page: Tensor, offset: Tensor, k: Tensor) -> None:
    """Store ``k [n, K, D]`` at ``offset [n]`` of ``page [n]``."""
    column = _columns(pages)[offset % LANES]
    pages[page, :, offset // LANES, : k.shape[2], column] = k.to(pages.dtype)


def read_keys(pages: Tensor, page: Tensor, offset: Tensor, head_dim: int) -> Tensor:
    """The keys at ``offset [n]`` of ``page [n]`` as ``[n, K, D]`` float32."""
    column = _columns(pages)[offset % LANES]
    return pages[page, :, offset // LANES, :head_dim, column].float()


def write_values(pages: Tensor, page: Tensor, offset: Tensor, v: Tensor) -> None:
    """Store ``v [n, K, D]`` at ``offset [n]`` of ``page [n]``."""
    padded = torch.nn.functional.pad(v, (0, pages.shape[3] - v.shape[2]))
    lines = torch.empty_like(torch.unflatten(padded, 2, (-1, LANES)), dtype=pages.dtype)
    lines[..., _columns(pages)] = torch.unflatten(padded, 2, (-1, LANES)).to(pages.dtype)
    panels = torch.unflatten(pages, 3, (-1, LANES))  # [P, K, groups, padded D / LANES, key, column]
    panels[page, :, offset // LANES, :, offset % LANES] = lines


def read_values(pages: Tensor, page: Tensor, offset: Tensor, head_dim: int) -> Tensor:
    """The values at ``offset [n]`` of ``page [n]`` as ``[n, K, D]`` float32."""
    panels = torch.unflatten(pages, 3, (-1, LANES))
    lines = panels[page, :, offset // LANES, :, offset % LANES]  # [n, K, padded D / LANES, LANES]
    return lines[..., _columns(pages)].flatten(2)[..., :head_dim].float()


def move_keys(pages: Tensor, to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> None:
    """Copy keys from ``(page [n], offset [n])`` to others, all read before any is written."""
    (to_page, to_at), (page, at) = to, source
    columns = _columns(pages)
    lines = pages[page, :, at // LANES, :, columns[at % LANES]]  # [n, K, padded D]
    pages[to_page, :, to_at // LANES, :, columns[to_at % LANES]] = lines


def move_values(pages: Tensor, to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> None:
    """Copy values likewise."""
    (to_page, to_at), (page, at) = to, source
    panels = torch.unflatten(pages, 3, (-1, LANES))
    lines = panels[page, :, at // LANES, :, at % LANES]  # [n, K, padded D / LANES, LANES]
    panels[to_page, :, to_at // LANES, :, to_at % LANES] = lines


def _columns(pages: Tensor) -> Tensor:
    """Where in a line each of the `LANES` lanes lies."""
    lanes = torch.arange(LANES, device=pages.device)
    if pages.dtype != torch.bfloat16:
        return lanes
    return lanes % 8 * 2 + lanes // 8
