"""Gather over the data ranks: the ranks of an SP group hold the same rows, which must count once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from hf_veomni.comm import all_gather
from hf_veomni.expert import counts_tokens


def gather_rows(data: Any, group: dist.ProcessGroup | None) -> Any:
    """Concatenate the rows of all data ranks, in data-rank order, for each tensor in a nested structure.

    Args:
        data: tensors [b, ...], alike in all but the first size (the last batch of an epoch may be short); a scalar
            counts as one row. In the loss of a batch that only keeps its rank in step (`counting_no_tokens`) they are
            none; if it is so on all ranks, they count.
        group: one rank of each SP group; None if there is one data rank.

    Returns:
        Tensors [sum of b, ...], the same on every rank.

    Collectives: two all-gathers over `group` for each tensor. No gradient.
    """
    return recursively_apply(_gather_one, data, group, error_on_other_type=True)


def _gather_one(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rows = tensor.detach().clone()[None] if tensor.dim() == 0 else tensor.detach().contiguous()
    if group is None:
        return rows
    size = rows.shape[0]
    sizes = all_gather(rows.new_tensor([[size, size * counts_tokens()]], dtype=torch.long), group)
    longest = int(sizes[:, 0].max())
    counts: list[int] = sizes[:, int(sizes[:, 1].any())].tolist()
    if rows.shape[0] < longest:
        rows = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    as_bytes = rows.dtype == torch.bool  # gloo has no bool
    sent = rows.view(torch.uint8) if as_bytes else rows
    out = all_gather(sent, group)
    out = out.view(torch.bool) if as_bytes else out
    if set(counts) == {longest}:
        return out
    return torch.cat([part[:count] for part, count in zip(out.split(longest), counts, strict=True)])


def reduce_rows(data: Any, reduction: str, group: dist.ProcessGroup | None) -> Any:
    """Reduce each tensor in a nested structure over the data ranks.

    Args:
        reduction: "sum", "mean", "max", or "none", which leaves the tensors as they are.
        group: one rank of each SP group; None if there is one data rank.

    Returns:
        New tensors of the same shapes, the same on every rank but for "none".

    Collective: one all-reduce over `group` for each tensor. No gradient.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("sum", "mean", "max", "none"):
        raise ValueError(f"`reduction` ({reduction!r}) must be 'sum', 'mean', 'max' or 'none'.")
    return recursively_apply(_reduce_one, data, reduction, group, error_on_other_type=True)


def _reduce_one(tensor: Tensor, reduction: str, group: dist.ProcessGroup | None) -> Tensor:
    reduced = tensor.detach().clone()
    if group is None or reduction == "none":
        return reduced
    dist.all_reduce(reduced, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM, group=group)
    return reduced / dist.get_world_size(group) if reduction == "mean" else reduced


def gather_objects(data: list[Any], group: dist.ProcessGroup | None) -> list[Any]:
    """The lists of all data ranks as one list, in data-rank order; which of them count is as in `gather_rows`.

    Collective: one all-gather of pickled objects over `group`.
    """
    if group is None:
        return list(data)
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (counts_tokens(), data), group=group)
    counted = [part for counts, part in found if counts] or [part for _, part in found]
    return [entry for part in counted for entry in part]
