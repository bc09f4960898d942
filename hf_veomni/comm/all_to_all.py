"""All-to-all along the first dimension, with uneven splits and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`all_to_all_single` without gradient: `send[r]` leading rows go to rank r, `receive[r]` come from it."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return exchange(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grads[0], ctx.group, ctx.receive, ctx.send), None, None, None


def all_to_all(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Exchange blocks of leading rows between the ranks of `group`.

    Args:
        x: local tensor [sum(send), ...]; block r, of `send[r]` rows, goes to rank r.
        receive: rows that arrive from each rank; `receive[r]` here equals `send[me]` on rank r.

    Returns:
        Local tensor [sum(receive), ...], blocks in rank order.

    Collective: one all-to-all over `group`; its backward is the reverse all-to-all.
    """
    return _AllToAll.apply(x, group, tuple(send), tuple(receive))
