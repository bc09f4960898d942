"""The exchange of tokens for heads around an attention that is patched."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.ulysses import head_layout, heads_to_sequence, sequence_to_heads


def exchanged(
    state: ParallelState,
    attend: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """`attend` on [B, h, S', D] of this rank's heads, given which; local [B, H, s, D] in, [B, s, H, D] out."""
    group = state.sp_group
    assert group is not None
    layout = head_layout(query.shape[1], key.shape[1], dist.get_world_size(group))
    first, last = layout.query[state.sp_rank]
    query, key, value = sequence_to_heads(query, key, value, layout, group)
    out = attend(query, key, value, slice(first, last))
    return heads_to_sequence(out.transpose(1, 2), layout, group)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [B, h, S', S'] under a mask, boolean (true where a token may look) or to be added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
