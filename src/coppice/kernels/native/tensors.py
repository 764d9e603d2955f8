"""From tensors to what the extension takes: checked, contiguous, of the right type."""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.errors import EngineError
from coppice.kernels import _native
from coppice.kernels.interface import Activation, QKNorm
from coppice.kernels.pages import page_shape, page_size_of

KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`KvKind` of kernels.h."""

ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
QK_NORMS: dict[QKNorm, int] = {"none": 0, "head": 1, "full": 2}


def ready(x: Tensor, count: int | None = None) -> Tensor:
    """``x`` as contiguous float32 (copied only if it is not), of ``count`` elements."""
    if x.dtype != torch.float32:
        x = x.float()
    if not x.is_contiguous():
        x = x.contiguous()
    if count is not None and x.numel() != count:
        raise EngineError(f"A tensor has {x.numel()} elements where {count} are needed.")
    return x


def cache_of(k_pages: Tensor, v_pages: Tensor, head_dim: int) -> _native.Cache:
    """Addresses and shape of one layer's pages."""
    kind = KV_KINDS.get(k_pages.dtype)
    if kind is None or v_pages.dtype != k_pages.dtype:
        raise EngineError(f"KV pages must be float32, bfloat16 or int8, not {k_pages.dtype}.")
    num_pages, num_kv_heads = k_pages.shape[:2]
    page_size = page_size_of(k_pages)
    shape = page_shape(num_pages, num_kv_heads, page_size, head_dim, k_pages.dtype)
    if k_pages.shape != shape or v_pages.shape != shape:
        raise EngineError(f"KV pages of heads of {head_dim} must be {list(shape)} in shape.")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise EngineError("KV pages must be contiguous.")
    return _native.Cache(
        k_pages.data_ptr(), v_pages.data_ptr(), num_pages, num_kv_heads, page_size, head_dim, kind
    )
