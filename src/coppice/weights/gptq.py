"""Quantization that corrects each rounding with the weights not yet rounded.

The inputs of a layer over calibration text give ``H = X^T X``. Columns are rounded one after
the other; what rounding one column does to the layer's output is made up for, in the least
squares sense under ``H``, by moving the columns still to come. Columns are taken in blocks,
so that most of the work is matrix products.

Scales are those of the original weight, fitted before the first column moves (weighted by
the diagonal of ``H``): groups then stay runs of neighbouring inputs whatever order the
columns are taken in, and nothing has to be permuted when the layer runs.

Source: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ (ICLR 2023; arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coppice.errors import CheckpointError
from coppice.kernels.formats import Format, Quantized
from coppice.weights.rounding import check_width, code_range, fit_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """How to run the method.

    Attributes:
        damping: added to the diagonal of ``H``, as a share of its mean.
        act_order: take columns by falling input energy rather than from left to right.
        block: columns between two updates of all columns still to come.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128

    def quantize(
        self,
        weight: Tensor,
        hessian: Tensor,
        fmt: Format,
        *,
        name: str = "weight",
        scale_dtype: torch.dtype = torch.float32,
    ) -> Quantized:
        """Quantize ``weight [n, K]`` for inputs with ``hessian [K, K]``.

        Raises:
            CheckpointError: the group does not divide ``K``; a weight is not finite; or the
                Hessian is not, or cannot be factored even when damped a thousandfold.
        """
        check_width(name, weight.shape[1], fmt)
        diagonal = hessian.diagonal()
        scales, zeros = fit_scales(
            weight,
            fmt,
            name=name,
            importance=diagonal.clamp(min=0) + 1e-6 * diagonal.mean().clamp(min=1e-30),
            scale_dtype=scale_dtype,
        )
        order = torch.arange(weight.shape[1])
        if self.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
        inverse = self._inverse_factor(hessian[order][:, order], name)
        group = torch.arange(weight.shape[1]) // (fmt.group or weight.shape[1])
        steps = scales.t()[group[order]].contiguous()  # [K, n]
        offsets = None if zeros is None else zeros.t()[group[order]].contiguous()
        columns = weight.float().t()[order].contiguous()  # [K, n]
        rounded = self._sweep(columns, inverse, steps, offsets, code_range(fmt))
        codes = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.int8)
        codes[order] = rounded
        return Quantized(
            codes.t().contiguous(), scales, None if zeros is None else zeros.to(torch.int8)
        )

    def _inverse_factor(self, hessian: Tensor, name: str) -> Tensor:
        """Upper Cholesky factor ``[K, K]`` of the inverse of the damped Hessian."""
        h = hessian.double()
        mean = h.diagonal().mean()
        if not torch.isfinite(h).all() or mean <= 0:
            raise CheckpointError(
                f"{name}: its inputs over the calibration text are zero or not finite; "
                "calibrate on ordinary text the model can read."
            )
        for times in (1, 10, 100, 1000):
            damped = h + torch.eye(h.shape[0], dtype=h.dtype) * (self.damping * times * mean)
            lower, fault = torch.linalg.cholesky_ex(damped)
            if int(fault) == 0:
                inverse = torch.cholesky_inverse(lower)
                upper, fault = torch.linalg.cholesky_ex(inverse, upper=True)
                if int(fault) == 0:
                    factor: Tensor = upper.float()
                    return factor
        raise CheckpointError(f"{name}: its inputs are degenerate; calibrate on more text.")

    def _sweep(
        self,
        columns: Tensor,
        factor: Tensor,
        steps: Tensor,
        offsets: Tensor | None,
        limits: tuple[int, int],
    ) -> Tensor:
        """Round ``columns [K, n]`` (in order, modified) to codes ``[K, n]`` int8."""
        codes = torch.empty(columns.shape, dtype=torch.int8)
        for start in range(0, columns.shape[0], self.block):
            end = min(start + self.block, columns.shape[0])
            errors = torch.empty(end - start, columns.shape[1])
            local = factor[start:end, start:end]
            for i in range(end - start):
                column, step = columns[start + i], steps[start + i]
                code = torch.round(column / step)
                if offsets is None:
                    code.clamp_(*limits)
                    value = code * step
                else:
                    code.add_(offsets[start + i]).clamp_(*limits)
                    value = (code - offsets[start + i]) * step
                codes[start + i] = code
                errors[i] = (column - value) / local[i, i]
                columns[start + i + 1 : end].addr_(local[i, i + 1 :], errors[i], alpha=-1)
            columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
        return codes
