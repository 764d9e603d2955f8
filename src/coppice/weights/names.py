"""The quantizations people ask for by name, and the formats behind them.

Under every 4-bit name the embedding and the output matrix are stored at 8 bits: an output
matrix at 4 bits costs the most quality of all layers, and other engines keep it at 6 to 16
bits too. Norms, biases and the routers of mixtures stay floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coppice.errors import ConfigError
from coppice.kernels.formats import Activations, Format

DEFAULT_GROUP = 64
"""Group of ``int4``: see ``python -m benchmarks.quality`` for what it costs and saves."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Which format each kind of layer gets.

    Attributes:
        name: what users write.
        layers: format of the layers' matrices.
        embedding: format of the embedding and of the output matrix.
    """

    name: str
    layers: Format
    embedding: Format


def integer_format(
    bits: Literal[8, 4], group: int, *, zero_points: bool = False, activations: Activations
) -> Format:
    """A format under its systematic name, such as ``int4-g128-zp-weight-only``.

    Args:
        bits: per weight.
        group: inputs per scale; 0 for one scale per output channel.
        zero_points: asymmetric codes.
        activations: what the rows are multiplied as.
    """
    name = f"int{bits}"
    name += f"-g{group}" if group else ""
    name += "-zp" if zero_points else ""
    name += "-weight-only" if activations == "float" else ""
    return Format(
        name=name, bits=bits, group=group, zero_points=zero_points, activations=activations
    )


def with_activations(fmt: Format, activations: Activations) -> Format:
    """The same codes, multiplied with other rows."""
    bits: Literal[8, 4] = 8 if fmt.bits == 8 else 4  # noqa: PLR2004
    return integer_format(bits, fmt.group, zero_points=fmt.zero_points, activations=activations)


def _schemes() -> dict[str, Scheme]:
    found = {}
    for end, activations in _ENDINGS.items():
        int8 = integer_format(8, 0, activations=activations)
        found[f"int8{end}"] = Scheme(f"int8{end}", int8, int8)
        for name, group in _INT4.items():
            layers = integer_format(4, group, activations=activations)
            found[f"{name}{end}"] = Scheme(f"{name}{end}", layers, int8)
    return found


_ENDINGS: dict[str, Activations] = {"": "int8", "-weight-only": "float"}
_INT4 = {"int4": DEFAULT_GROUP, "int4-g32": 32, "int4-g64": 64, "int4-g128": 128}

SCHEMES = _schemes()
"""Every quantization that can be asked for, by name."""


def scheme(name: str) -> Scheme:
    """The quantization called ``name``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SCHEMES:
        raise ConfigError(
            f"quantization {name[:80]!r} is unknown; choose from {', '.join(SCHEMES)}.",
            param="quantization",
        )
    return SCHEMES[name]
