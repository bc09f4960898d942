"""The one token-count rule: shift the full labels, slice them, divide by the count of the full rows.

Shapes: B rows, S tokens of a full row, s = S / sp tokens on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

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


def local_targets(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    local_length: int,
    group: dist.ProcessGroup | None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Targets of this rank's tokens, and the number of valid targets in the full rows.

    The shift comes before the cut: the last token of a shard is scored on the first label of the next shard.

    Args:
        labels: full rows [B, S], not shifted; ignored if `shift_labels` is given.
        shift_labels: already shifted; full rows [B, S] or this rank's part [B, s].
        local_length: s. Full rows may be up to sp - 1 tokens shorter than s * sp, where the model padded its input.

    Returns:
        Targets [B, s], and the count as a 0-dim integer tensor.

    Collective: none, except for local `shift_labels`: an all-reduce (sum) of their counts over `group`.

    Raises:
        ValueError: a length that fits neither the full rows nor this rank's part.
    """
    size = 1 if group is None else dist.get_world_size(group)
    if shift_labels is not None:
        name, targets = "shift_labels", shift_labels
    elif labels is not None:
        name, targets = "labels", F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    else:
        raise ValueError("`labels` (None) or `shift_labels` (None) must be given: the loss needs targets.")
    length = targets.shape[-1]
    if group is not None and shift_labels is not None and length == local_length:
        count = (targets != ignore_index).sum()
        dist.all_reduce(count, group=group)
        return targets, count
    missing = local_length * size - length
    if not 0 <= missing < size:
        raise ValueError(
            f"`{name}` of length {length} must be as long as the full row, {local_length * size} tokens here "
            f"({local_length} on each of {size} ranks): pass the labels of the same row as `input_ids`."
        )
    count = (targets != ignore_index).sum()
    if group is None:
        return targets, count
    if targets.dim() != 2:
        raise ValueError(
            f"`{name}` of shape {tuple(targets.shape)} must be [rows, tokens] under sequence parallelism: "
            "use sp_size=1."
        )
    start = dist.get_rank(group) * local_length
    padded = F.pad(targets, (0, missing), value=ignore_index)
    return padded[:, start : start + local_length], count


def denominator(num_items_in_batch: Count | None, count: Tensor, device: torch.device) -> Count:
    """What the summed token losses are divided by: `num_items_in_batch` if given, else the count of the full rows."""
    chosen = count if num_items_in_batch is None else num_items_in_batch
    return chosen.to(device) if isinstance(chosen, Tensor) else chosen
