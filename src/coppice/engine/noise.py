"""Whose noise a sequence sees: the seed of each choice of a request.

The noise itself is `coppice.kernels.noise.gumbel`, a function of (seed, position, token
id) and nothing else, so a request meets the same noise alone or in a batch, in one chunk
or many, before and after preemption, and on every branch of a token tree.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def choice_seed(seed: int, choice_index: int = 0) -> int:
    """The 64-bit noise key of choice ``choice_index`` of a request seeded ``seed``.

    Choice 0 keeps the seed, so that it equals the same request sent with ``n = 1``; other
    choices get a key mixed from both (the SplitMix64 finalizer, Steele et al., OOPSLA 2014).
    """
    key = seed & _MASK
    if choice_index == 0:
        return key
    z = (key + choice_index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
