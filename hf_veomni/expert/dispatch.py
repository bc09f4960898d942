"""Tokens to the ranks of their experts and back.

Shapes: t tokens on this rank, K experts for each, P = t * K pairs; R pairs that this rank's experts get from all ranks
of the EP group; H hidden size; E experts, e = E / ep on this rank.

    x [t, H] -> sort pairs by expert [P, H] -> all-to-all [R, H] -> sort by local expert -> experts -> [R, H]
    [t, H]   <- weigh, sum over K    [P, H] <- all-to-all [R, H] <- undo the sort                   <-

Each rank may send any number of pairs to any rank, none included; nothing is dropped and nothing is padded. Four
all-to-alls of P * H elements a step (two in forward, two in backward), of which (ep - 1) / ep leave the rank when
routing is even, beside one of E counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import Flight, all_to_all, exchange, land, launch
from hf_veomni.expert.compute import Groups


@dataclass(frozen=True, eq=False)
class Route:
    """Where the pairs of this rank go, and in which order they are computed there.

    Attributes:
        order: [P] pairs sorted by expert.
        groups: pairs for each local expert, [e].
        arriving: [E] pairs for each local expert from each rank in turn; None without a group.
        send, receive: pairs exchanged with each rank of the group; None without a group.
    """

    order: Tensor
    groups: Groups
    arriving: Tensor | None = None
    send: list[int] | None = None
    receive: list[int] | None = None

    @cached_property
    def inverse(self) -> Tensor:
        """[P] place of each pair in the order."""
        return _invert(self.order)

    @cached_property
    def arrival(self) -> Tensor:
        """[R] order that sorts what arrives by local expert."""
        assert self.arriving is not None and self.receive is not None
        ranks = len(self.receive)
        local = torch.arange(len(self.groups.counts), device=self.order.device).repeat(ranks)
        local = local.repeat_interleave(self.arriving, output_size=sum(self.receive))
        return torch.argsort(local, stable=True)


def count_pairs(experts: Tensor, num_experts: int, weights: Tensor | None = None) -> Tensor:
    """[E] how often each expert was chosen; unlike `torch.bincount` without reading the device."""
    weights = torch.ones_like(experts) if weights is None else weights
    return weights.new_zeros(num_experts).scatter_add_(0, experts, weights)


def _invert(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


def make_route(top_k_index: Tensor, num_experts: int, group: dist.ProcessGroup | None) -> Route:
    """Plan the exchange of one layer: `make_routes` in one chunk."""
    return make_routes(top_k_index, num_experts, group)[0]


def make_routes(
    top_k_index: Tensor, num_experts: int, group: dist.ProcessGroup | None, chunks: int = 1
) -> list[Route]:
    """Plan the exchanges of one layer.

    Args:
        top_k_index: [t, K] expert of each pair, counted over all E experts.
        num_experts: E.
        group: the EP group; None where every expert is here.
        chunks: of tokens, as `chunk_sizes` has them; as many on all ranks of the group.

    Collective: one all-to-all of chunks * E counts, read back to the host (the layer's only synchronisation).
    """
    parts = [part.reshape(-1) for part in top_k_index.split(chunk_sizes(len(top_k_index), chunks))]
    orders = [torch.argsort(experts, stable=True) for experts in parts]
    counts = [count_pairs(experts, num_experts) for experts in parts]
    if group is None:
        return [Route(order, Groups(count)) for order, count in zip(orders, counts, strict=True)]
    ranks = dist.get_world_size(group)
    sent = torch.stack([count.view(ranks, -1) for count in counts], dim=1).flatten()  # [ranks, chunks, e]
    each = [len(sent) // ranks] * ranks
    came = exchange(sent, group, each, each)
    arrivals = came.view(ranks, chunks, -1)
    known: list[Any] = torch.stack([sent, came]).view(2, ranks, chunks, -1).tolist()
    routes = []
    for chunk, order in enumerate(orders):
        arriving = arrivals[:, chunk]
        send, receive = ([sum(row[chunk]) for row in rows] for rows in known)
        sizes = [sum(column) for column in zip(*(row[chunk] for row in known[1]), strict=True)]
        routes.append(Route(order, Groups(arriving.sum(0), sizes), arriving.flatten(), send, receive))
    return routes


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk, as even as can be; chunks may be empty."""
    small, larger = divmod(tokens, chunks)
    return [small + (chunk < larger) for chunk in range(chunks)]


class _RepeatTokens(torch.autograd.Function):
    """x [t, H] -> [P, H] in the order of the experts; the gradient sums each token's K pairs, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, top_k: int) -> Tensor:
        ctx.route, ctx.top_k = route, top_k
        return x[route.order // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows = grads[0][ctx.route.inverse]
        return rows.view(len(rows) // ctx.top_k, ctx.top_k, rows.shape[-1]).sum(1), None, None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the gradient goes back through the inverse (a gather, where autograd would scatter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.inverse], None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def dispatch(x: Tensor, route: Route, top_k: int, group: dist.ProcessGroup | None) -> Tensor:
    """The rows that this rank's experts work on, sorted by local expert.

    Args:
        x: local tokens [t, H].

    Returns:
        Local tensor [R, H]. Its gradient is multiplied by ep on the way back, and that of `combine` divided: inside,
        expert parameters get 1 / ep of their gradient. FSDP averages them over efsdp and dp_replicate only, and with
        this factor that is the average over all ranks that sent tokens, for any reduction that FSDP knows.

    Collective: one all-to-all over `group`; its backward is the reverse.
    """
    if route.send is None or route.receive is None or group is None:
        return _RepeatTokens.apply(x, route, top_k)
    rows = _leave(x, route, top_k)
    rows = all_to_all(rows, group, route.send, route.receive)
    return _arrive(rows, route)


def launch_dispatch(x: Tensor, route: Route, top_k: int, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of `dispatch`, which `land_dispatch` ends."""
    assert route.send is not None and route.receive is not None
    return launch(_leave(x, route, top_k), group, route.send, route.receive)


def land_dispatch(flight: Flight, route: Route) -> Tensor:
    return _arrive(land(flight), route)


def _leave(x: Tensor, route: Route, top_k: int) -> Tensor:
    return _RepeatTokens.apply(_ScaleGradient.apply(x, float(len(route.send or ()))), route, top_k)


def _arrive(rows: Tensor, route: Route) -> Tensor:
    return _Reorder.apply(rows, route.arrival, _invert(route.arrival))


def combine(rows: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """The experts' outputs, weighed and summed for each token of this rank; the inverse of `dispatch`.

    Args:
        rows: local tensor [R, H], sorted by local expert.
        weights: router weights [t, K] of this rank's tokens. They stay here, so their gradient needs no exchange.

    Returns:
        Local tensor [t, H] in the dtype of the weighted sum.

    Collective: one all-to-all over `group`; its backward is the reverse.
    """
    if route.send is not None and route.receive is not None and group is not None:
        rows = _Reorder.apply(rows, _invert(route.arrival), route.arrival)
        rows = all_to_all(rows, group, route.receive, route.send)
        rows = _ScaleGradient.apply(rows, 1.0 / len(route.send))
    return _weigh(rows, weights, route)


def launch_combine(rows: Tensor, route: Route, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of `combine`, which `land_combine` ends."""
    assert route.send is not None and route.receive is not None
    return launch(_Reorder.apply(rows, _invert(route.arrival), route.arrival), group, route.receive, route.send)


def land_combine(flight: Flight, weights: Tensor, route: Route) -> Tensor:
    return _weigh(_ScaleGradient.apply(land(flight), 1.0 / len(flight.send)), weights, route)


def _weigh(rows: Tensor, weights: Tensor, route: Route) -> Tensor:
    pairs = _Reorder.apply(rows, route.inverse, route.order).view(*weights.shape, rows.shape[-1])
    return (pairs * weights.unsqueeze(-1)).sum(1)
