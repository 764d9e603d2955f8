"""Under a rule that keeps the distribution, what the next token is, told as a mask of one.

The sampler still chooses, so that faults and log-probabilities are what they always are.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from coppice.engine.sequence import Sequence
from coppice.kernels.ranking import distribution
from coppice.kernels.sampling import Mask
from coppice.speculation import Drawn
from coppice.speculation.verify import PositionChance, next_token


def decide(sequence: Sequence, drawn: Drawn, logits: Tensor, mask: Mask | None) -> Mask | None:
    """A mask that leaves one token to a sampled sequence whose next ones were drawn.

    Args:
        sequence: its tokens end at the node whose children were drawn.
        drawn: the children.
        logits: ``[V]`` at that node.
        mask: what a grammar allows there.

    Returns:
        ``mask`` itself where the rule has nothing to say: a greedy request, damaged logits,
        nothing allowed.
    """
    row = sequence.sampler.row
    values = logits.numpy()
    if row.inv_temperature == 0.0 or not bool(np.all(values < np.inf)):
        return mask
    p = distribution(values, row, mask)
    if not np.isfinite(p).all() or len(p) != len(drawn.q):
        return mask
    token = next_token(p, drawn, PositionChance(row.seed, len(sequence.tokens)))
    only: Mask = np.zeros(-(-len(values) // 32), np.int32)
    only.view(np.uint32)[token // 32] = np.uint32(1 << token % 32)
    return only
