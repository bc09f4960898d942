"""Tokens to the ranks of their experts and back.

Shapes: t tokens on this rank, K experts for each, P = t * K pairs; R pairs that this rank's experts get from all ranks
of the EP group; C hidden size; E experts, e = E / ep on this rank.

    x [t, C] -> sort pairs by expert [P, C] -> all-to-all [R, C] -> sort by local expert -> experts -> [R, C]
    [t, C]   <- weigh, sum over K    [P, C] <- all-to-all [R, C] <- undo the sort                   <-

Each rank may send any number of pairs to any rank, none included; nothing is dropped and nothing is padded. Four
all-to-alls of P * C elements a step (two in forward, two in backward), of which (ep - 1) / ep leave the rank when
routing is even, beside one of E counts and, forward and backward, one of the P router weights.

A rank weighs what comes back for its tokens. The backward weighs on the other side, where the experts' output is: what
goes there is the gradient of each token's sum, and the router weights' own gradient is taken there and sent home.

    forward      y [R, C] ---------------------------> sum over K of w * y
    backward     w * g, <g, y> <---------------------- g, once for each of the K pairs

So nothing that an exchange brings back is kept for the backward, and a recomputation under activation checkpointing
ends at the experts' output: it repeats one exchange where there would be two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import Flight, exchange, give_way, land, launch
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
    """x [t, C] -> [P, C] in the order of the experts; the gradient sums each token's K pairs, in a fixed order."""

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


class _WeighGradient(torch.autograd.Function):
    """Rows [R, C] as they are; in the backward times weights [R], whose gradient is rows * gradient, summed over C."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.unpacked = None
        return rows.view_as(rows)

    @staticmethod
    def unpack(ctx: Any) -> None:
        """Get what was saved; under activation checkpointing it is computed again here, and all else of the layer."""
        ctx.unpacked = ctx.saved_tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        (rows, weights), ctx.unpacked = ctx.unpacked or ctx.saved_tensors, None
        gradient = grads[0].to(torch.promote_types(rows.dtype, weights.dtype))
        of_weights = (gradient * rows).sum(-1).to(weights.dtype) if ctx.needs_input_grad[1] else None
        return (gradient * weights.unsqueeze(-1)).to(rows.dtype), of_weights


class _SumWeighed(torch.autograd.Function):
    """Rows [P, C] in the order of the experts to [t, C]; the gradient of rows is that of the sum, not weighed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.top_k, ctx.dtype = route, weights.shape[-1], rows.dtype
        return _sum_weighed(rows[route.inverse], weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].to(ctx.dtype)[ctx.route.order // ctx.top_k], None, None


def _sum_weighed(pairs: Tensor, weights: Tensor) -> Tensor:
    return (pairs.view(*weights.shape, pairs.shape[-1]) * weights.unsqueeze(-1)).sum(1)


class Dispatched(NamedTuple):
    """Exchanges of a dispatch that are under way: of rows, and of weights where there is a backward."""

    rows: Flight
    weights: Flight | None


def launch_dispatch(x: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup) -> Dispatched:
    """Start the exchanges of `dispatch`, which `land_dispatch` ends."""
    assert route.send is not None and route.receive is not None
    # Inside, expert parameters get 1 / ep of their gradient; see `dispatch`.
    rows = _RepeatTokens.apply(_ScaleGradient.apply(x, float(len(route.send))), route, weights.shape[-1])
    flight = launch(rows, group, route.send, route.receive)
    if not torch.is_grad_enabled():
        return Dispatched(flight, None)
    pairs = _Reorder.apply(weights.reshape(-1), route.order, route.inverse)
    return Dispatched(flight, launch(pairs, group, route.send, route.receive))


def land_dispatch(flights: Dispatched, route: Route) -> tuple[Tensor, Tensor | None]:
    back = _invert(route.arrival)
    rows = _Reorder.apply(land(flights.rows), route.arrival, back)
    return rows, None if flights.weights is None else _Reorder.apply(land(flights.weights), route.arrival, back)


def dispatch(
    x: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """The rows that this rank's experts work on, sorted by local expert, and their router weights.

    Args:
        x: local tokens [t, C].
        weights: router weights [t, K] of this rank's tokens.

    Returns:
        Local tensor [R, C], and the weights [R] for `combine`; None without a group or a backward. The rows' gradient
        is multiplied by ep on the way back, and that of `combine` divided: inside, expert parameters get 1 / ep of
        their gradient. FSDP averages them over efsdp and dp_replicate only, and with this factor that is the average
        over all ranks that sent tokens, for any reduction that FSDP knows.

    Collective: two all-to-alls over `group`, of rows and of weights; their backward is the reverse.
    """
    if group is None:
        return _RepeatTokens.apply(x, route, weights.shape[-1]), None
    flights = launch_dispatch(x, weights, route, group)
    give_way()
    return land_dispatch(flights, route)


@torch.compiler.disable  # a compiler knows no nodes of the graph
def launch_combine(rows: Tensor, arrived: Tensor | None, route: Route, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of `combine`, which `land_combine` ends."""
    assert route.send is not None and route.receive is not None
    rows = _ScaleGradient.apply(rows, 1.0 / len(route.send))
    meanwhile = None
    if arrived is not None:
        rows = _WeighGradient.apply(rows, arrived)
        meanwhile = partial(_WeighGradient.unpack, rows.grad_fn) if rows.requires_grad else None
    rows = _Reorder.apply(rows, _invert(route.arrival), route.arrival)
    return launch(rows, group, route.receive, route.send, meanwhile)


def land_combine(flight: Flight, weights: Tensor, route: Route) -> Tensor:
    return _SumWeighed.apply(land(flight), weights.detach(), route)


def combine(
    rows: Tensor, arrived: Tensor | None, weights: Tensor, route: Route, group: dist.ProcessGroup | None
) -> Tensor:
    """The experts' outputs, weighed and summed for each token of this rank; the inverse of `dispatch`.

    Args:
        rows: local tensor [R, C], sorted by local expert.
        arrived: their weights [R], as `dispatch` returns them.
        weights: router weights [t, K] of this rank's tokens.

    Returns:
        Local tensor [t, C] in the dtype of the weighted sum.

    Collective: one all-to-all over `group`; its backward is the reverse.
    """
    if group is None:
        return _sum_weighed(_Reorder.apply(rows, route.inverse, route.order), weights)
    flight = launch_combine(rows, arrived, route, group)  # pyright: ignore[reportCallIssue]
    give_way()
    return land_combine(flight, weights, route)
