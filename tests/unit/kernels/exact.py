"""The operators in float64, written from their definitions, one element at a time."""

import math

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


def attention(q, rows, k_pages, v_pages, *, scale, window=0, softcap=0.0, sinks=None):
    """Every row and head on its own, in float64."""
    _, num_heads, _ = q.shape
    group = num_heads // k_pages.shape[1]
    page_size = k_pages.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        slots = visible(rows, row)
        slots = torch.tensor(slots[-window:] if window else slots)
        page = rows.page_table[rows.sequence[row]][slots // page_size].long()
        for head in range(num_heads):
            k = k_pages[page, head // group, slots % page_size].double()
            v = v_pages[page, head // group, slots % page_size].double()
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
