"""Rotary position embeddings: which frequencies a layer rotates by, and their table.

Sources: Su et al., RoFormer (2021); position interpolation, Chen et al. (2023); YaRN, Peng
et al. (2023); LongRoPE, Ding et al. (2024); the Llama 3.1 frequency bands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from coppice.errors import CheckpointError, EngineError, UnsupportedModelError
from coppice.models.fields import Fields, short

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "original_max_position_embeddings",
        }
    ),
    "longrope": frozenset(
        {
            "factor",
            "attention_factor",
            "short_factor",
            "long_factor",
            "original_max_position_embeddings",
        }
    ),
}
_ALWAYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"})
_BLOCK = 4096
"""Positions filled at once, and always at multiples of this, so that a position's cosines
never depend on when they were first needed (vectorized tails may round differently)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions turn into angles for some of the layers.

    Attributes:
        kind: the scaling law.
        theta: base wavelength.
        dim: rotated dims of a head, even; the rest passes through.
        original: context length of the pretraining, for the laws that need it.
        factor: stretch of the context; 0 where the file leaves it to be derived.
        attention_factor: multiplies cosines and sines; 0 where it is to be derived.
    """

    kind: RopeKind
    theta: float
    dim: int
    original: int
    max_position: int
    factor: float = 1.0
    attention_factor: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


def read_rope(
    params: Mapping[str, Any],
    *,
    theta: float,
    head_dim: int,
    max_position: int,
    partial: float | None = None,
    original: int | None = None,
) -> RopeSpec:
    """Read one set of rope parameters (``rope_parameters`` or the older ``rope_scaling``).

    Args:
        params: the JSON object.
        theta: base wavelength where ``params`` names none.
        head_dim: dims of a head.
        max_position: the model's ``max_position_embeddings``.
        partial: share of a head that is rotated, where ``params`` names none; None where
            the architecture always rotates whole heads.
        original: ``original_max_position_embeddings`` given beside the object; it wins.

    Raises:
        UnsupportedModelError: a scaling law or parameter that is not built.
        CheckpointError: a parameter is missing or out of range.
    """
    fields = Fields(params, where="config.json (rope parameters)")
    kinds = {kind: kind for kind in _KEYS} | {"su": "longrope"}
    key = "rope_type" if "rope_type" in params else "type"
    kind: RopeKind = fields.choice(key, kinds, "default")
    for name, value in params.items():
        if name not in _KEYS[kind] and name not in _ALWAYS and value is not None:
            raise UnsupportedModelError(
                f"Rope parameter {name!r} = {short(value)} is not supported with rope type "
                f"{kind!r}; supported beside it: {', '.join(sorted(_KEYS[kind])) or 'none'}."
            )
    share = fields.number("partial_rotary_factor", partial or 1.0)
    if partial is None and share != 1:
        raise UnsupportedModelError(
            f"Rope parameter 'partial_rotary_factor' = {share} is not supported for this "
            "architecture; supported: 1.0."
        )
    dim = int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:  # noqa: PLR2004
        raise UnsupportedModelError(
            f"Rope would rotate {dim} of {head_dim} dims of a head; an even number is needed."
        )
    if original is None:
        original = fields.integer("original_max_position_embeddings", max_position)
    base = fields.number("rope_theta", theta)
    if base <= 1 or original <= 1:  # the laws divide by their logarithms
        raise CheckpointError(
            f"Rope needs a theta and an original context above 1; found {base} and {original}."
        )
    return RopeSpec(
        kind=kind,
        theta=base,
        dim=dim,
        original=original,
        max_position=max_position,
        **_scaling(fields, kind, dim),
    )


def _scaling(fields: Fields, kind: RopeKind, dim: int) -> dict[str, Any]:
    """The parameters only some laws have."""
    if kind == "default":
        return {}
    if kind in ("linear", "dynamic"):
        return {"factor": fields.number("factor")}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        found = {name: fields.number(name) for name in names}
        if found["high_freq_factor"] <= found["low_freq_factor"]:
            raise CheckpointError("Rope type 'llama3' needs high_freq_factor > low_freq_factor.")
        return found
    found = {
        "factor": fields.optional_number("factor"),
        "attention_factor": fields.optional_number("attention_factor"),
    }
    if kind == "yarn":
        found["beta_fast"] = fields.number("beta_fast", 32.0)
        found["beta_slow"] = fields.number("beta_slow", 1.0)
        found["mscale"] = fields.number("mscale", 0.0, positive=False)
        found["mscale_all_dim"] = fields.number("mscale_all_dim", 0.0, positive=False)
        return {**found, "truncate": fields.flag("truncate", True)}
    factors = {name: _factors(fields, name, dim // 2) for name in ("short_factor", "long_factor")}
    return {**found, **factors}


def _factors(fields: Fields, key: str, count: int) -> tuple[float, ...]:
    values = fields.sequence(key)
    ok = values is not None and len(values) == count
    if not ok or not all(type(v) in (int, float) and 0 < v < math.inf for v in values or ()):
        raise fields.wrong(key, values, f"a list of {count} positive numbers")
    return tuple(float(v) for v in values or ())


def max_context(spec: RopeSpec) -> int:
    """Longest context whose angles depend on the position alone.

    Dynamic NTK scaling changes every angle once a sequence outgrows the original length;
    cached keys would no longer match, so the context stops there.
    """
    return spec.original if spec.kind == "dynamic" else spec.max_position


def frequencies(spec: RopeSpec, context: int) -> tuple[Tensor, float]:
    """Inverse frequencies ``[dim // 2]`` float32 and the factor on cosines and sines.

    LongRoPE has one set of frequencies for sequences up to the original length and one for
    longer ones. The choice is made once, by the context served, not per sequence: keys in
    the cache stay valid when a sequence grows past the original length.
    """
    exponent = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    wavelengths = spec.theta**exponent  # [dim // 2], over 2 pi
    match spec.kind:
        case "linear":
            return 1.0 / wavelengths / spec.factor, 1.0
        case "llama3":
            return _llama3(spec, 1.0 / wavelengths), 1.0
        case "yarn":
            return _yarn(spec, wavelengths), _yarn_attention(spec)
        case "longrope":
            scale = spec.long_factor if context > spec.original else spec.short_factor
            return 1.0 / (torch.tensor(scale) * wavelengths), _longrope_attention(spec)
        case _:
            return 1.0 / wavelengths, 1.0


def _llama3(spec: RopeSpec, inverse: Tensor) -> Tensor:
    """Long wavelengths stretched by the factor, short ones kept, the band between blended."""
    wavelength = 2 * math.pi / inverse
    low, high = spec.original / spec.low_freq_factor, spec.original / spec.high_freq_factor
    blend = (spec.original / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    stretched = inverse / spec.factor
    mixed = (1 - blend) * stretched + blend * inverse
    return torch.where(wavelength > low, stretched, torch.where(wavelength < high, inverse, mixed))


def _stretch(spec: RopeSpec) -> float:
    return spec.factor or spec.max_position / spec.original


def _yarn(spec: RopeSpec, wavelengths: Tensor) -> Tensor:
    """Interpolate slow dims, keep fast dims, with a linear ramp between (YaRN, eq. 23)."""

    def dim_at(rotations: float) -> float:
        ratio = spec.original / (rotations * 2 * math.pi)
        return spec.dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dim_at(spec.beta_fast), dim_at(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(spec.dim // 2, dtype=torch.float32)
    keep = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    return 1.0 / (_stretch(spec) * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _yarn_attention(spec: RopeSpec) -> float:
    if spec.attention_factor:
        return spec.attention_factor

    def mscale(weight: float) -> float:
        stretch = _stretch(spec)
        return 1.0 if stretch <= 1 else 0.1 * weight * math.log(stretch) + 1.0

    if spec.mscale and spec.mscale_all_dim:
        return mscale(spec.mscale) / mscale(spec.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention(spec: RopeSpec) -> float:
    if spec.attention_factor:
        return spec.attention_factor
    stretch = _stretch(spec)
    if stretch <= 1:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(spec.original))


class RopeTable:
    """Cosines and sines of the positions reached so far, ``[positions, 2, dim // 2]`` float32.

    It grows as positions are first reached, and is another tensor then: the longest context a
    checkpoint declares is a number, and takes no memory before somebody needs it.

    Args:
        spec: the law; None makes a table without dims (layers without positions).
        context: number of positions.
        like: a tensor on the device the table shall live on.
    """

    def __init__(self, spec: RopeSpec | None, context: int, like: Tensor) -> None:
        dims = spec.dim // 2 if spec else 0
        places = 0 if spec else context
        self.cos_sin = torch.empty(places, 2, dims, dtype=torch.float32, device=like.device)
        self._context = context
        self._filled = 0 if spec else context
        if spec:
            inverse, self._scale = frequencies(spec, context)
            self._inverse = inverse.to(like.device)

    def reach(self, positions: int) -> None:
        """Fill the table for positions below ``positions``.

        Raises:
            EngineError: beyond the context. The scheduler admits no such sequence.
        """
        if positions > self._context:
            raise EngineError(f"Position {positions - 1} is beyond the context {self._context}.")
        if positions > self._filled:
            with torch.inference_mode():  # the table may have been made in it
                self._fill(positions)

    def _fill(self, positions: int) -> None:
        if positions > len(self.cos_sin):
            whole = max(-(-positions // _BLOCK) * _BLOCK, 2 * len(self.cos_sin))
            grown = self.cos_sin.new_empty(min(whole, self._context), *self.cos_sin.shape[1:])
            grown[: self._filled] = self.cos_sin[: self._filled]
            self.cos_sin = grown
        while self._filled < positions:
            start, stop = self._filled, min(self._filled + _BLOCK, self._context)
            angle = torch.arange(start, stop, device=self.cos_sin.device).float()[:, None]
            angle = angle * self._inverse  # [block, dim // 2]
            self.cos_sin[start:stop, 0] = angle.cos() * self._scale
            self.cos_sin[start:stop, 1] = angle.sin() * self._scale
            self._filled = stop
