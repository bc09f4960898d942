"""Exchanges in two phases: values and gradients in fp64, and the order in which both directions start and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm import all_to_all, land, launch
from hf_veomni.context import within

# splits[r][p]: rows that rank r sends to rank p.
SPLITS = {"even": [[3, 3], [3, 3]], "uneven": [[1, 4], [2, 0]], "nothing": [[0, 5], [0, 3]], "empty": [[0, 0], [0, 0]]}


def _rows(rank: int, splits: Sequence[Sequence[int]]) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(splits[rank]), 2, 3, generator=generator, dtype=torch.float64)


def _function(arrived: Tensor, rank: int) -> Tensor:
    """Of what a rank got; another one on each."""
    places = torch.arange(1, arrived.numel() + 1, dtype=torch.float64).view(arrived.shape)
    return (arrived * arrived * places * (rank + 1)).sum()


def _expected(splits: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """One process: what arrives on each rank, and the gradients of the sum of both functions."""
    leaves = [_rows(rank, splits).requires_grad_() for rank in range(2)]
    blocks = [leaf.split(list(sizes)) for leaf, sizes in zip(leaves, splits, strict=True)]
    arrived = [torch.cat([blocks[0][rank], blocks[1][rank]]) for rank in range(2)]
    sum(_function(x, rank) for rank, x in enumerate(arrived)).backward()  # pyright: ignore
    return [x.detach() for x in arrived], [leaf.grad for leaf in leaves]  # pyright: ignore


class _Log:
    """A transport that notes what it is asked, in turn."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def start(self, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Any:
        self.events.append(("start", tuple(x.shape)))
        blocks = list(x.split(list(send)))
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, torch.cat(blocks), list(receive), list(send), group=group)
        return out

    def wait(self, ticket: Tensor) -> Tensor:
        self.events.append(("wait", tuple(ticket.shape)))
        return ticket


def _exchanged(splits: list[list[int]], phases: bool) -> tuple[Tensor, Tensor | None]:
    rank = dist.get_rank()
    x, group = _rows(rank, splits).requires_grad_(), dist.group.WORLD
    assert group is not None
    send, receive = splits[rank], [row[rank] for row in splits]
    if phases:
        flight = launch(x.transpose(1, 2).contiguous().transpose(1, 2), group, send, receive)
        between = (x * 0).sum()
        arrived = land(flight)
    else:
        arrived, between = all_to_all(x, group, send, receive), torch.zeros((), dtype=torch.float64)
    (_function(arrived, rank) + between).backward()
    return arrived.detach(), x.grad


@pytest.mark.parametrize("phases", (False, True))
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_an_exchange_and_its_gradient_equal_one_process(ranks, splits: list[list[int]], phases: bool) -> None:
    arrived, grads = _expected(splits)
    for rank, (found, grad) in enumerate(ranks(2).run(_exchanged, splits, phases, timeout=60)):
        torch.testing.assert_close(found, arrived[rank], rtol=0, atol=0)
        torch.testing.assert_close(grad, grads[rank], rtol=0, atol=0)


def _two_in_flight() -> tuple[list[tuple[str, Any]], bool]:
    """Two exchanges that overlap, one of 2 and one of 4 rows."""
    group, log = dist.group.WORLD, _Log()
    assert group is not None
    one, two = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    with within(transport=log):
        first = launch(one * 3, group, [1, 1], [1, 1])
        second = launch(two * 5, group, [2, 2], [2, 2])
        loss = land(first).sum() + 2 * land(second).sum()
    loss.backward()
    same = torch.equal(one.grad, torch.full_like(one, 3)) and torch.equal(two.grad, torch.full_like(two, 10))  # pyright: ignore
    return log.events, same


def test_the_backward_of_two_in_flight_overlaps_as_their_forward_did(ranks) -> None:
    forward = [("start", (2,)), ("start", (4,)), ("wait", (2,)), ("wait", (4,))]
    backward = [("start", (4,)), ("start", (2,)), ("wait", (4,)), ("wait", (2,))]
    for events, same in ranks(2).run(_two_in_flight, timeout=60):
        assert events == forward + backward and same


def _twice() -> list[Tensor]:
    group = dist.group.WORLD
    assert group is not None
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = all_to_all(x, group, [2, 2], [2, 2]).square().sum()
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    with torch.no_grad():
        return [*grads, all_to_all(x, group, [2, 2], [2, 2])]


def test_a_graph_that_is_kept_goes_back_twice_and_no_graph_is_needed(ranks) -> None:
    for first, second, value in ranks(2).run(_twice, timeout=60):
        assert torch.equal(first, torch.full((4,), 2.0, dtype=torch.float64)) and torch.equal(first, second)
        assert torch.equal(value, torch.ones(4, dtype=torch.float64))
