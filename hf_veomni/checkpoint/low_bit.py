"""The state of torchao's low-bit optimizers (`AdamW8bit`, `AdamW4bit`) on disk: plain numbers, read by any plan.

torchao keeps a moment of a rank's shard as a code for each element and one scale for each block of neighbours, so
codes mean nothing beside another shard's. Files hold what they stand for, in fp32, made of one tensor at a time:

    shard   codes [n], scale [n / block] --> file   qmap[codes] * scale, fp32 [n]
    file    fp32 [n] ----------------------> shard  blocks of the shard as it is now: scale, then the nearest codes

Where the blocks are the ones that were written, their codes and scales come back, to the last bit of a scale. Under
another plan a block has other neighbours, and its values are rounded as in any step of such an optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_veomni.checkpoint.lazy import LazyTensor

_LEAST = 1e-12  # of a scale, as in torchao: a block of zeros has one too
_ROUNDING = 1e-6  # fp32, some ulps


def is_low_bit(tensor: object) -> bool:
    """Whether this is a moment in codes and scales. Known by its parts: torchao is not imported here."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "codes") and hasattr(tensor, "scale")


def as_written(part: Tensor) -> Tensor:
    """What a file holds of this rank's part: of codes the fp32 that they stand for, made when it is read."""
    if not is_low_bit(part):
        return part
    coded: Any = part
    return LazyTensor(part.shape, torch.float32, lambda box: coded.dequantize()[box])


@torch.no_grad()
def fill(part: Tensor, values: Tensor) -> None:
    """Overwrite this rank's part, in codes or not, with `values` of its shape. No collective."""
    if not is_low_bit(part) or not hasattr(part, "qmap"):  # float8 has no table, and its own rounding is symmetric
        part.copy_(values)
        return
    coded: Any = part
    table: Tensor = coded.qmap
    blocks = values.to(part.device, torch.float32).reshape(-1, coded.block_size)
    scale = blocks.amax(1)
    if coded.signed:
        # The lowest code stands for less than -1 times the scale: where it was the largest of the block, torchao's
        # own rounding would take a smaller scale, and moments would shrink from one checkpoint to the next.
        lowest = blocks.amin(1) / table[0]
        scale = torch.where(lowest > scale * (1 + _ROUNDING), lowest, scale)
    scale = scale.clip(_LEAST)
    codes = torch.bucketize(blocks / scale[:, None], (table[1:] + table[:-1]) / 2).to(torch.uint8).reshape(-1)
    if coded.codes.numel() < codes.numel():  # two in a byte
        codes = (codes[::2] << 4) | codes[1::2]
    coded.codes.copy_(codes.view(coded.codes.shape))
    coded.scale.copy_(scale)
