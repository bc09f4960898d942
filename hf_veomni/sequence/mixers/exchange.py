"""Exchange tokens for heads around a scan, and pass the last tokens on for a convolution.

    rank r before   all n heads, its s = S/sp tokens        [B, s, n, *]     several tensors, each with its spans
    all-to-all      its heads, all S tokens                 [B, S, n_r, *]

Shapes: B rows; S, s tokens of the full row and of this rank; n heads (or groups, or channels) of a tensor, n_r those
of rank r; * a width, or nothing. A tensor whose spans overlap is sent to several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm import all_to_all

Span = tuple[int, int]


def tokens_to_heads(
    tensors: Sequence[Tensor], spans: Sequence[Sequence[Span]], group: dist.ProcessGroup | None, rank: int
) -> list[Tensor]:
    """Local [B, s, n, *] tensors to [B, S, n_r, *].

    Args:
        spans: for each tensor the half-open span of its heads that each rank gets.
        group: None leaves the tensors as they are.

    Collective: one all-to-all over `group` per dtype among the tensors; the backward is the reverse one, which sums
    the gradients of heads that several ranks got.
    """
    if group is None:
        return list(tensors)
    out: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        found = _send_heads([tensors[i] for i in chosen], [spans[i] for i in chosen], group, rank)
        out.update(zip(chosen, found, strict=True))
    return [out[i] for i in range(len(tensors))]


def _send_heads(
    tensors: Sequence[Tensor], spans: Sequence[Sequence[Span]], group: dist.ProcessGroup, rank: int
) -> list[Tensor]:
    size = dist.get_world_size(group)
    rows, part = tensors[0].shape[:2]
    blocks = [
        torch.cat([x[:, :, slice(*span[peer])].flatten(2) for x, span in zip(tensors, spans, strict=True)], dim=-1)
        for peer in range(size)
    ]
    mine = blocks[rank]
    received = all_to_all(
        torch.cat([block.flatten() for block in blocks]),
        group,
        [block.numel() for block in blocks],
        [mine.numel()] * size,
    )
    full = received.view(size, rows, part, mine.shape[-1]).transpose(0, 1).flatten(1, 2)  # [B, S, W]
    shapes = [(span[rank][1] - span[rank][0], *x.shape[3:]) for x, span in zip(tensors, spans, strict=True)]
    widths = [torch.Size(shape).numel() for shape in shapes]
    pieces = zip(full.split(widths, dim=-1), shapes, strict=True)
    return [piece.unflatten(-1, shape) for piece, shape in pieces]


def heads_to_tokens(out: Tensor, spans: Sequence[Span], group: dist.ProcessGroup | None, rank: int) -> Tensor:
    """[B, S, n_r, *] of this rank's heads to [B, s, n, *] of this rank's tokens, heads in rank order.

    Collective: one all-to-all over `group`; the backward is the reverse one.
    """
    if group is None:
        return out
    size = dist.get_world_size(group)
    send = out.unflatten(1, (size, -1)).transpose(0, 1)  # [sp, B, s, n_r, *]
    shapes = [(*send.shape[1:3], high - low, *out.shape[3:]) for low, high in spans]
    counts = [torch.Size(shape).numel() for shape in shapes]
    received = all_to_all(send.flatten(), group, [counts[rank]] * size, counts)
    pieces = zip(received.split(counts), shapes, strict=True)
    return torch.cat([piece.view(shape) for piece, shape in pieces], dim=2)
