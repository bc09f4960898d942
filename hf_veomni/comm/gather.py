"""All-gather of equal shards along a dimension, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        dist.all_gather_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].contiguous()
        out = whole.new_empty(whole.shape[0] // dist.get_world_size(ctx.group), *whole.shape[1:])
        dist.reduce_scatter_single(out, whole, group=ctx.group)
        return out, None


def gather_shards(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate the equal shards of all ranks along `dim`; every rank gets the whole.

    Args:
        x: this rank's shard; the same shape on every rank.

    Returns:
        Global tensor, `group size` times as long along `dim`, shards in rank order.

    Collective: one all-gather over `group`; its backward is a reduce-scatter (sum) of the gradients that all ranks
    have for the whole.
    """
    # Moved out here, so that a stand-in for logits is built in the graph of the model.
    return _GatherFirst.apply(x.movedim(dim, 0).contiguous(), group).movedim(0, dim)
