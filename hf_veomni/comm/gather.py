"""All-gather of equal shards along a dimension, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both, and warns of the names that older releases have.
_RENAMED = hasattr(dist, "all_gather_single")
ALL_GATHER = "all_gather_single" if _RENAMED else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if _RENAMED else "reduce_scatter_tensor"


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The shards [n, ...] of all ranks as one tensor [group size * n, ...], in rank order. No gradient.

    Collective: one all-gather over `group` (None: all ranks).
    """
    out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    getattr(dist, ALL_GATHER)(out, x, group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part [n, ...] of the sum over ranks of [group size * n, ...]. No gradient.

    Collective: one reduce-scatter (sum) over `group`.
    """
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    getattr(dist, REDUCE_SCATTER)(out, x, group=group)
    return out


class _GatherFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0].contiguous(), ctx.group), None


def gather_shards(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate the equal shards of all ranks along `dim`; every rank gets the full tensor.

    Args:
        x: this rank's shard; the same shape on every rank.

    Returns:
        Global tensor, `group size` times as long along `dim`, shards in rank order.

    Collective: one all-gather over `group`; its backward is a reduce-scatter (sum) of the gradients that all ranks
    have for the full tensor.
    """
    # Moved out here, so that lazy logits is built in the graph of the model.
    return _GatherFirst.apply(x.movedim(dim, 0).contiguous(), group).movedim(0, dim)
