"""Dispatch, experts and combine over ranks equal one loop over all experts, in fp64, however tokens are routed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.expert.dispatch import rows_per_token, saves_bytes

HIDDEN, TOP_K, EXPERTS = 6, 2, 8
ROUTINGS = ("random", "one expert", "own experts", "no tokens", "skip expert")


def _tokens(routing: str, rank: int) -> int:
    return 0 if routing == "no tokens" and rank % 2 else 5 + 2 * rank


def _inputs(routing: str, rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [t, H], experts [t, K] and weights [t, K] of one rank; another number of tokens on each."""
    generator = torch.Generator().manual_seed(rank)
    count = _tokens(routing, rank)
    x = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, TOP_K, generator=generator, dtype=torch.float64)
    if routing == "one expert":
        index = torch.full((count, TOP_K), EXPERTS - 1)
    elif routing == "own experts":
        each = EXPERTS // world_size
        index = rank * each + torch.randint(0, each, (count, TOP_K), generator=generator)
    else:
        low = 1 if routing == "skip expert" else 0
        index = torch.randint(low, EXPERTS, (count, TOP_K), generator=generator)
    return x, index, weights


def _matrices() -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)


def _expected(routing: str, world_size: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """One process, one loop: outputs and gradients of tokens and weights by rank, gradient of all experts."""
    matrices = _matrices().requires_grad_()
    outputs: list[Tensor] = []
    leaves: list[tuple[Tensor, Tensor]] = []
    for rank in range(world_size):
        x, index, weights = _inputs(routing, rank, world_size)
        leaves.append((x.requires_grad_(), weights.requires_grad_()))
        rows = [
            torch.stack([w * torch.tanh(token @ matrices[e]) for e, w in zip(ids, ws, strict=True)]).sum(0)
            for token, ids, ws in zip(x, index, weights, strict=True)
        ]
        outputs.append(torch.stack(rows) if rows else x.new_zeros(0, HIDDEN))
    total = torch.stack([(rank + 1) * out.square().sum() for rank, out in enumerate(outputs)]).sum()
    found = torch.autograd.grad(total, [matrices, *(t for pair in leaves for t in pair)], allow_unused=True)
    flat = [tensor for pair in leaves for tensor in pair]
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(flat, found[1:], strict=True)]
    return [out.detach() for out in outputs], filled[0::2], filled[1::2], found[0]


def _compare(routing: str, bundled: bool) -> float:
    from hf_veomni.expert.compute import grouped_matmul, keep_connected
    from hf_veomni.expert.dispatch import combine, dispatch, make_route

    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    each = EXPERTS // world_size
    mine = _matrices()[rank * each : (rank + 1) * each].requires_grad_()
    x, index, weights = _inputs(routing, rank, world_size)
    x.requires_grad_()
    weights.requires_grad_()
    route = make_route(index, EXPERTS, group, bundled)
    rows, arrived = dispatch(x, weights, route, group)
    count = len(rows)
    rows, local = keep_connected(rows, route.groups)
    out = combine(torch.tanh(grouped_matmul(rows, mine, local))[:count], arrived, weights, route, group)
    ((rank + 1) * out.square().sum()).backward()
    outputs, tokens, routers, experts = _expected(routing, world_size)
    assert x.grad is not None and weights.grad is not None
    assert mine.grad is not None, "a rank without tokens must have a gradient of zeros, not none"
    pairs = [
        (out.detach(), outputs[rank]),
        (x.grad, tokens[rank]),
        (weights.grad, routers[rank]),
        (mine.grad * world_size, experts[rank * each : (rank + 1) * each]),  # FSDP's part of the average is left
    ]
    return max([float((got - wanted).abs().max()) for got, wanted in pairs if wanted.numel()], default=0.0)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("world_size", "bundled"), [(2, False), (4, False), pytest.param(2, True, marks=pytest.mark.slow), (4, True)]
)
def test_exchange_equals_one_loop(ranks, world_size, routing, bundled):
    assert max(ranks(world_size).run(_compare, routing, bundled, timeout=60)) < 1e-13


def _bytes(top_k: int, bundled: bool) -> tuple[int, int]:
    """Elements that `all_to_all_single` was handed in a step, and those that left the rank, of rows."""
    from hf_veomni.expert.dispatch import combine, dispatch, make_route

    handed, left, others = [], [], []
    stock = dist.all_to_all_single

    def counting(out: Tensor, x: Tensor, receive: list[int] | None = None, send: list[int] | None = None, **kwargs):
        if x.dim() == 1:
            others.append(x.numel())
        else:
            assert send is not None
            handed.append(x.numel())
            left.append(x.numel() - send[dist.get_rank()] * x[0].numel())
        return stock(out, x, receive, send, **kwargs)

    ranks, tokens = dist.get_world_size(), 8
    index = (torch.arange(tokens * top_k) % EXPERTS).view(tokens, top_k)  # even
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    dist.all_to_all_single = counting
    try:
        route = make_route(index, EXPERTS, dist.group.WORLD, bundled)
        weights = torch.ones(tokens, top_k, requires_grad=True)
        rows, arrived = dispatch(x, weights, route, dist.group.WORLD)
        combine(rows, arrived, weights, route, dist.group.WORLD).sum().backward()
    finally:
        dist.all_to_all_single = stock
    assert len(handed) == 4, "dispatch and combine, forward and backward"
    if not bundled:
        assert others == [EXPERTS, tokens * top_k, tokens * top_k], "counts; weights forward and backward"
        assert sum(handed) == 4 * tokens * top_k * HIDDEN
        assert sum(left) * ranks == sum(handed) * (ranks - 1)
        return sum(handed), sum(left)
    each, me = EXPERTS // ranks, dist.get_rank()
    assert others == [EXPERTS + ranks, *[tokens * top_k] * 3], "counts; which row, weights forward and backward"
    bags = [set((row // each).tolist()) for row in index]
    assert sum(handed) == 4 * sum(map(len, bags)) * HIDDEN, "a row for each rank that has an expert of a token"
    own = sum(me in bag for bag in bags)
    away, came = sum(map(len, bags)) - own, own * (ranks - 1)  # from ranks with the same tokens
    assert sum(left) == 2 * (away + came) * HIDDEN
    return sum(handed), sum(left)


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_elements_sent_equal_the_formula(ranks, world_size, bundled):
    ranks(world_size).run(_bytes, TOP_K, bundled, timeout=60)


@pytest.mark.parametrize(
    ("top_k", "experts", "ranks", "rows", "worth"),
    [
        (8, 128, 8, 5.34, True),
        (8, 128, 16, 6.60, True),
        (2, 8, 2, 1.57, True),
        (2, 4, 2, 1.67, False),
        (8, 256, 64, 7.68, False),
        (1, 16, 4, 1.0, False),
    ],
)
def test_bundles_only_where_they_save_bytes(top_k, experts, ranks, rows, worth):
    assert rows_per_token(top_k, experts, ranks) == pytest.approx(rows, abs=0.01)
    assert saves_bytes(top_k, experts, ranks) is worth
