"""Make the ranks start from the same parameters."""

from __future__ import annotations

import logging
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def _fingerprint(tensor: Tensor) -> Tensor:
    """One int64 that changes when a bit changes, up to collisions: weighted sums over the raw words."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.numel() % 4 == 0:
        raw = raw.view(torch.int32)
    step = 1 << 20
    sums = [
        (part.long() * (torch.arange(part.numel(), device=raw.device) % 65521 + 1)).sum() for part in raw.split(step)
    ]
    weights = torch.arange(1, len(sums) + 1, device=raw.device)
    return (torch.stack(sums) * weights).sum() if sums else raw.new_zeros((), dtype=torch.long)


def synchronize_parameters(model: nn.Module) -> list[str]:
    """Give every rank rank 0's value of each parameter and buffer that differs between ranks.

    Without it FSDP would cut every rank's shard from its own copy, and a LoRA adapter initialised without a common
    seed would be a silent mixture.

    Returns:
        Names of the tensors that differed.

    Collectives: two small all-reduces, and a broadcast of each tensor that differs, over all ranks.
    """
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    named = {name: tensor for name, tensor in named.items() if tensor.numel()}
    if not named or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    prints = torch.stack([_fingerprint(tensor) for tensor in named.values()])
    low, high = prints.clone(), prints
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = [name for name, same in zip(named, (low == high).tolist(), strict=True) if not same]
    for name in different:
        dist.broadcast(named[name].detach(), src=0)
    if different and dist.get_rank() == 0:
        logger.warning(
            "%d tensors differed between the ranks (first: %s); rank 0's are used.", len(different), different[0]
        )
    return different
