"""All-gather of equal shards along a dimension, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        size = dist.get_world_size(group)
        moved = x.movedim(dim, 0).contiguous()
        out = moved.new_empty(size * moved.shape[0], *moved.shape[1:])
        dist.all_gather_single(out, moved, group=group)
        return out.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        moved = grads[0].movedim(ctx.dim, 0).contiguous()
        out = moved.new_empty(moved.shape[0] // dist.get_world_size(ctx.group), *moved.shape[1:])
        dist.reduce_scatter_single(out, moved, group=ctx.group)
        return out.movedim(0, ctx.dim), None, None


def gather_shards(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate the equal shards of all ranks along `dim`; every rank gets the whole.

    Args:
        x: this rank's shard; the same shape on every rank.

    Returns:
        Global tensor, `group size` times as long along `dim`, shards in rank order.

    Collective: one all-gather over `group`; its backward is a reduce-scatter (sum) of the gradients that all ranks
    have for the whole.
    """
    return _GatherShards.apply(x, group, dim % x.dim())
