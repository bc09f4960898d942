"""The one token-count rule: shift the full labels, slice them, divide by the count of the full rows.

Shapes: B rows, S tokens of a full row, s = S / sp tokens on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply

Count = Tensor | float


class _SumOverSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


def sum_over_sequence(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Loss of the full row from every rank's part of it.

    Args:
        part: this rank's token losses, summed and divided by the count of the full rows; scalar, fp32 or fp64.
        group: the ranks that share the rows; None on one rank.

    Returns:
        Scalar, the same on all ranks of `group`.

    Collective: an all-reduce (sum) over `group`. The backward has none: it multiplies by the group's size, since FSDP
    then averages over these ranks and each of them has the gradient of its own part only.
    """
    return part if group is None else _SumOverSequence.apply(part, group)


def targets_and_count(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Count | None,
    local_length: int,
    group: dist.ProcessGroup | None,
    ignore_index: int = -100,
) -> tuple[Tensor, Count]:
    """Targets of this rank's tokens, and what the sum of their losses is divided by.

    The shift comes before the cut: the last token of a shard is scored on the first label of the next shard.

    Args:
        labels: full rows [B, S], not shifted; ignored if `shift_labels` is given.
        shift_labels: already shifted; full rows [B, S] or this rank's part [B, s].
        num_items_in_batch: the divisor, if the caller has one; else it is the valid targets of the full rows.
        local_length: s. Full rows may be up to sp - 1 tokens shorter than s * sp, where the model padded its input.

    Returns:
        Targets [B, s], and the divisor.

    Collective: none, unless `shift_labels` is local and has to be counted: then an all-reduce (sum) over `group`.

    Raises:
        ValueError: a length that fits neither the full rows nor this rank's part, or could be either.
    """
    if shift_labels is not None:
        name, targets = "shift_labels", shift_labels
    elif labels is not None:
        name, targets = "labels", apply(F.pad, labels, (-1, 1), value=ignore_index)
    else:
        raise ValueError("`labels` (None) or `shift_labels` (None) must be given: the loss needs targets.")
    divisor = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if group is None:
        return targets, divisor
    if targets.dim() != 2:
        raise UnsupportedError(
            f"`{name}` of shape {tuple(targets.shape)} must be [rows, tokens] under sequence parallelism: "
            "use sp_size=1."
        )
    if shift_labels is not None and targets.shape[1] == local_length == 1:
        raise ValueError(
            f"`shift_labels` {tuple(targets.shape)} may be a full row of 1 token or this rank's 1 token of a longer "
            "row: pass `labels` for rows this short."
        )
    if shift_labels is not None and targets.shape[1] == local_length:
        if num_items_in_batch is None:
            dist.all_reduce(divisor, group=group)
        return targets, divisor
    return _shard(targets, name, local_length, group, ignore_index), divisor


def _shard(targets: Tensor, name: str, local_length: int, group: dist.ProcessGroup, ignore_index: int) -> Tensor:
    """[B, S] -> [B, s], where the model padded S up to s * sp."""
    size = dist.get_world_size(group)
    missing = local_length * size - targets.shape[1]
    if not 0 <= missing < size:
        raise ValueError(
            f"`{name}` of length {targets.shape[1]} must be as long as the full row, {local_length * size} tokens "
            f"({local_length} on each of {size} ranks): pass the labels of the same row as `input_ids`."
        )
    start = dist.get_rank(group) * local_length
    # Padded first: of a row shorter than the ranks are many, some ranks have padding alone.
    return apply(lambda x: F.pad(x, (0, missing), value=ignore_index)[:, start : start + local_length], targets)
