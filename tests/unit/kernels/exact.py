"""The operators in float64, written from their definitions, one element at a time."""

import math
from functools import cache

import torch


def linear(x, weight, bias=None, residual=None):
    out = x.double() @ weight.double().T
    out = out if bias is None else out + bias.double()
    return out if residual is None else out + residual.double()


def rms_norm(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotate(x, cos, sin):
    """``x [..., D]``; ``cos, sin [R // 2]``."""
    half = len(cos)
    out = x.clone()
    for j in range(half):
        a, b = x[..., j], x[..., half + j]
        out[..., j] = a * cos[j] - b * sin[j]
        out[..., half + j] = b * cos[j] + a * sin[j]
    return out


def visible(rows, row):
    """Slots row ``row`` sees, from the definition in `Rows`."""
    chain = []
    at = row
    while at >= 0:
        chain.append(int(rows.slot[at]))
        at = int(rows.parent[at])
    return list(range(int(rows.prefix_len[rows.sequence[row]]))) + chain[::-1]


def column(dtype, lane):
    """Where in a line of sixteen a lane lies: bfloat16 lines are two halves interleaved."""
    return [*range(0, 16, 2), *range(1, 16, 2)][lane] if dtype == torch.bfloat16 else lane


def scale(pages, page, head, offset):
    """An int8 group's last four lines are the float32 scales of its keys."""
    if pages.dtype != torch.int8:
        return 1.0
    return float(pages[page, head, offset // 16, -4:].flatten().view(torch.float32)[offset % 16])


def key(pages, page, head, offset, head_dim):
    """One key of K pages, as docs/internals/kernels.md says it lies; float64 ``[D]``."""
    lane = column(pages.dtype, offset % 16)
    stored = pages[page, head, offset // 16, :head_dim, lane].double()
    return stored * scale(pages, page, head, offset)


def value(pages, page, head, offset, head_dim):
    """One value of V pages."""
    lines = -(-head_dim // 16) * 16
    group = pages[page, head, offset // 16, :lines].view(-1, 16, 16)  # panel of dims, key, column
    lanes = [column(pages.dtype, i) for i in range(16)]
    stored = group[:, offset % 16, lanes].flatten()[:head_dim].double()
    return stored * scale(pages, page, head, offset)


def attention(q, rows, k_pages, v_pages, *, scale, window=0, softcap=0.0, sinks=None):
    """Every row and head on its own, in float64."""
    _, num_heads, head_dim = q.shape
    group = num_heads // k_pages.shape[1]
    page_size = k_pages.shape[2] * 16
    read = cache(lambda of, *place: of(k_pages if of is key else v_pages, *place, head_dim))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        slots = visible(rows, row)
        slots = slots[-window:] if window else slots
        table = rows.page_table[rows.sequence[row]].tolist()
        places = [(table[slot // page_size], slot % page_size) for slot in slots]
        for head in range(num_heads):
            k = torch.stack([read(key, page, head // group, at) for page, at in places])
            v = torch.stack([read(value, page, head // group, at) for page, at in places])
            logits = (k @ q[row, head].double()) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().reshape(1)])
            weights = torch.softmax(logits, 0)[: len(slots)]
            out[row, head] = weights @ v
    return out.flatten(1)


def activation(x, kind):
    x = x.double()
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))
    return 0.5 * x * torch.erfc(-x / math.sqrt(2))
