"""Storage formats of weights.

Owns how a weight is stored and applied. Refuses to know what a layer is for. Invariant: a
`Linear` gives the same bits for a row whatever rows stand beside it.
"""

from coppice.kernels.formats import BF16, F32, Format, Quantized
from coppice.weights.linear import Linear, Part

__all__ = ["BF16", "F32", "Format", "Linear", "Part", "Quantized"]
