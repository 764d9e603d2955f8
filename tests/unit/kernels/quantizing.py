"""Formats and random quantized weights for the kernel tests, and their float64 meaning."""

import torch

from coppice.kernels.formats import Format, Quantized

INT8 = [Format(name="int8", bits=8, activations="int8")] + [
    Format(name=f"int8-g{group}", bits=8, group=group, activations="int8")
    for group in (32, 64, 128)
]
INT4 = [
    Format(name=f"int4-g{group}", bits=4, group=group, zero_points=zeros, activations="int8")
    for group in (32, 64, 128)
    for zeros in (False, True)
]


def random_weight(n, k, fmt, seed=0):
    """Codes over the whole range, scales of a few magnitudes, exact in float16."""
    torch.manual_seed(seed)
    least, end = (-127, 128) if fmt.bits == 8 else (0, 16) if fmt.zero_points else (-8, 8)
    shape = (n, fmt.num_groups(k))
    scales = (torch.randn(shape).exp() / 64).half().float()
    zeros = torch.randint(0, 16, shape, dtype=torch.int8) if fmt.zero_points else None
    return Quantized(torch.randint(least, end, (n, k), dtype=torch.int8), scales, zeros)


def pack(ops, weight, fmt, bias=None):
    packed = ops.empty_linear(*weight.codes.shape, fmt, bias=bias is not None)
    ops.fill_linear(packed, 0, weight, bias)
    return packed


def rounded_rows(x, group):
    """``x`` as its int8 codes and scales stand for it, one group at a time, in float64."""
    out = x.double().clone()
    for first in range(0, x.shape[1], group):
        part = x[:, first : first + group]
        most = part.abs().amax(1, keepdim=True)
        codes = (part * (127 / most)).round().nan_to_num(0.0)
        out[:, first : first + group] = codes.double() * (most / 127).double()
    return out
