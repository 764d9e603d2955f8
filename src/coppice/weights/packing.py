"""Several small integers to an int32, as quantized checkpoints store them.

Everywhere the lowest bits hold the first of the values. Functions work on the last dim;
where a format packs along another one, transpose the packed words first: they are few.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coppice.errors import CheckpointError

AWQ_SLOTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column (of eight) each nibble of an AWQ word holds, from the lowest up."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 ``[..., n]`` to uint8 values ``[..., n * 32 / bits]``, 0 to ``2^bits - 1``."""
    octets: Tensor = words.contiguous().view(torch.uint8)
    if bits == 8:  # noqa: PLR2004
        return octets
    return torch.stack((octets & 0x0F, octets >> 4), -1).flatten(-2)


def pack(values: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`; a last dim that fills no whole word is filled up with zeros."""
    octets = F.pad(values.to(torch.uint8), (0, -values.shape[-1] % (32 // bits)))
    if bits == 4:  # noqa: PLR2004
        octets = octets[..., 0::2] | (octets[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 ``[..., n]`` in AWQ's order to uint8 ``[..., 8 n]`` in the natural one."""
    slots = torch.unflatten(unpack(words, 4), -1, (-1, 8))
    column_to_slot = torch.argsort(torch.tensor(AWQ_SLOTS))
    natural: Tensor = slots[..., column_to_slot]
    return natural.flatten(-2)


def grouped_order(group_of: Tensor, group: int, name: str) -> Tensor | None:
    """The order of inputs in which groups are runs of neighbours; None if they already are.

    Args:
        group_of: ``[K]`` the group of each input (``g_idx``).
        group: inputs per group.
        name: the tensor, for messages.

    Raises:
        CheckpointError: some group does not have exactly ``group`` inputs.
    """
    index = group_of.long()
    count = index.shape[0] // group
    if bool(((index < 0) | (index >= count)).any()) or bool(
        (torch.bincount(index, minlength=count) != group).any()
    ):
        raise CheckpointError(
            f"{name} does not put exactly {group} inputs in each of {count} groups; the "
            "checkpoint is damaged or of a layout that is not supported."
        )
    order = torch.argsort(index, stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order
