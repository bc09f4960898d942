"""Exchanges of linear attention on real ranks in fp64: nothing but tokens and heads change hands, gradients add up."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_veomni.sequence.mixers.exchange import heads_to_tokens, tokens_to_heads
from hf_veomni.sequence.ulysses import head_layout


def _there_and_back(heads: int, groups: int) -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    layout = head_layout(heads, groups, size)
    torch.manual_seed(0)
    full = [
        torch.randn(2, 5 * size, heads, 3, dtype=torch.float64),
        torch.randn(2, 5 * size, groups, 4, dtype=torch.float64),
        torch.randn(2, 5 * size, heads, dtype=torch.float64),
        torch.randn(2, 5 * size, groups, 2, dtype=torch.float32),
    ]
    spans = (layout.query, layout.key_value, layout.query, layout.key_value)
    mine = slice(rank * 5, rank * 5 + 5)
    local = [x[:, mine].clone().requires_grad_() for x in full]
    found = tokens_to_heads(local, spans, group, rank)
    for x, y, span in zip(full, found, spans, strict=True):
        assert torch.equal(x[:, :, slice(*span[rank])], y)
    assert torch.equal(heads_to_tokens(found[0], layout.query, group, rank), local[0])
    # A loss of rank r weighs its heads by r + 1: a head that several ranks got has the sum of their weights.
    loss = heads_to_tokens(found[0], layout.query, group, rank).sum()
    (loss + sum((x * (rank + 1)).sum() for x in found)).backward()
    for i, (x, span) in enumerate(zip(local, spans, strict=True)):
        weight = torch.zeros(x.shape[2], dtype=x.dtype)
        for peer, (low, high) in enumerate(span):
            weight[low:high] += peer + 1
        weight = weight + 1 if i == 0 else weight
        assert torch.equal(x.grad, weight.view(-1, *[1] * (x.dim() - 3)).expand_as(x))


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (5, 5), (6, 1), (8, 4)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_tokens_change_for_heads_and_back(ranks, world_size, heads, groups):
    ranks(world_size).run(_there_and_back, heads, groups, timeout=60)
