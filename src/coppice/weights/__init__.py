"""Storage formats of weights.

Owns how a weight is stored and applied. Refuses to know what a layer is for. Invariant: a
`Linear` gives the same bits for a row whatever rows stand beside it.
"""

from coppice.weights.linear import Kind, Linear, Part

__all__ = ["Kind", "Linear", "Part"]
