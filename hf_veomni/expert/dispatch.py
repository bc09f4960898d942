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

Where a token has several experts on a rank often enough, one row goes there for all of them (`bundles`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import comb
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.comm.all_to_all import Flight, exchange, give_way, land, launch, launch_data
from hf_veomni.expert.bundles import Bags, Bundles, Spread, SumBags, count_hits, sum_bags
from hf_veomni.expert.compute import Groups

WORTH = 0.83  # of the rows of one a pair: bundles have to save a sixth, or another exchange and its sorts do not pay


@dataclass(frozen=True, eq=False)
class Route:
    """Where the pairs of this rank go, and in which order they are computed there.

    Attributes:
        order: [P] pairs sorted by expert.
        groups: pairs for each local expert, [e].
        arriving: [E] pairs for each local expert from each rank in turn; None without a group.
        send, receive: pairs exchanged with each rank of the group; None without a group.
        bundles: the rows that stand for them; None where each pair has its own.
    """

    order: Tensor
    groups: Groups
    arriving: Tensor | None = None
    send: list[int] | None = None
    receive: list[int] | None = None
    bundles: Bundles | None = None

    def again(self) -> Route:
        """The same without what was derived from it."""
        return replace(self, bundles=None if self.bundles is None else replace(self.bundles))

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


def rows_per_token(top_k: int, num_experts: int, ranks: int) -> float:
    """How many ranks have at least one of `top_k` different experts, on average, where routing is even."""
    others = num_experts - num_experts // ranks
    return ranks * (1 - comb(others, top_k) / comb(num_experts, top_k))


def saves_bytes(top_k: int, num_experts: int, ranks: int) -> bool:
    """Whether to send one row for all pairs of a token and rank; the same on all ranks, whatever they route."""
    return rows_per_token(top_k, num_experts, ranks) <= WORTH * top_k


def make_route(
    top_k_index: Tensor, num_experts: int, group: dist.ProcessGroup | None, bundled: bool | None = None
) -> Route:
    """Plan the exchange of one layer: `make_routes` in one chunk."""
    return make_routes(top_k_index, num_experts, group, bundled=bundled)[0]


def make_routes(
    top_k_index: Tensor,
    num_experts: int,
    group: dist.ProcessGroup | None,
    chunks: int = 1,
    bundled: bool | None = None,
) -> list[Route]:
    """Plan the exchanges of one layer.

    Args:
        top_k_index: [t, K] expert of each pair, counted over all E experts.
        num_experts: E.
        group: the EP group; None where every expert is here.
        chunks: of tokens, as `chunk_sizes` has them; as many on all ranks of the group.
        bundled: one row for all pairs of a token and rank; the same on all ranks. None: where `saves_bytes` says so.

    Collective: one all-to-all of chunks * E counts, and of chunks * ranks more if bundled, read back to the host (the
    layer's only synchronisation).
    """
    index = top_k_index.split(chunk_sizes(len(top_k_index), chunks))
    parts = [part.reshape(-1) for part in index]
    orders = [torch.argsort(experts, stable=True) for experts in parts]
    counts = [count_pairs(experts, num_experts) for experts in parts]
    if group is None:
        return [Route(order, Groups(count)) for order, count in zip(orders, counts, strict=True)]
    ranks = dist.get_world_size(group)
    if bundled is None:
        bundled = saves_bytes(top_k_index.shape[-1], num_experts, ranks)
    leaving = torch.stack([count.view(ranks, -1) for count in counts], dim=1)  # [ranks, chunks, e]
    hits = [count_hits(part // leaving.shape[-1], ranks) for part in index] if bundled else []
    sent, came = exchange_counts(leaving, hits, group)
    known: list[Any] = torch.stack([sent, came]).tolist()
    e, routes = leaving.shape[-1], []
    for chunk, order in enumerate(orders):
        arriving = came[:, chunk, :e]
        send, receive = ([sum(row[chunk][:e]) for row in rows] for rows in known)
        sizes = [sum(column) for column in zip(*(row[chunk][:e] for row in known[1]), strict=True)]
        bundles = None
        if bundled:
            rows = ([row[chunk][e] for row in rows] for rows in known)
            bundles = make_bundles(hits[chunk], leaving[:, chunk], came[:, chunk], *rows)
        groups = Groups(arriving.sum(0), sizes)
        routes.append(Route(order, groups, arriving.flatten(), send, receive, bundles))
    return routes


def exchange_counts(leaving: Tensor, hits: list[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Pairs for each expert [ranks, chunks, e], and behind them rows of bundles, as they leave and as they come.

    Collective: one all-to-all over `group`.
    """
    if hits:
        leaving = torch.cat([leaving, torch.stack([hit.sum(1) for hit in hits], dim=1).unsqueeze(-1)], dim=-1)
    each = [leaving[0].numel()] * len(leaving)
    return leaving, exchange(leaving.flatten(), group, each, each).view_as(leaving)


def make_bundles(hits: Tensor, leaving: Tensor, came: Tensor, send: list[int], receive: list[int]) -> Bundles:
    """Of one chunk, from what `exchange_counts` returns of it: [ranks, e], and [ranks, e + 1] with the rows."""
    return Bundles(hits, leaving.sum(1), came[:, -1], came[:, :-1].sum(1), send, receive)


def chunk_sizes(tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk; chunks may be empty. The first and the last are half as large as the others.

    What the first sends, and what comes back of the last, has nothing to run under.
    """
    unit = 16 if tokens >= 16 * chunks else 1
    edges = [unit * round(tokens // unit * (2 * i - 1) / (2 * chunks - 2)) for i in range(1, chunks)]
    return [end - begin for begin, end in zip([0, *edges], [*edges, tokens], strict=True)]


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


def unpack(ctx: Any) -> None:
    """Get what a node saved; under activation checkpointing it is computed again here, and all else of the layer."""
    ctx.unpacked = ctx.saved_tensors


def _unpacked(ctx: Any) -> tuple[Tensor, ...]:
    """What it saved, once."""
    saved, ctx.unpacked = ctx.unpacked or ctx.saved_tensors, None
    return saved


class _WeighGradient(torch.autograd.Function):
    """Rows [R, C] as they are; in the backward times weights [R], whose gradient is rows * gradient, summed over C."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.unpacked = None
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, weights = _unpacked(ctx)
        gradient = grads[0].to(torch.promote_types(rows.dtype, weights.dtype))
        of_weights = (gradient * rows).sum(-1).to(weights.dtype) if ctx.needs_input_grad[1] else None
        return (gradient * weights.unsqueeze(-1)).to(rows.dtype), of_weights


class _WeighBags(torch.autograd.Function):
    """Rows [R, C] times weights [R], summed by bags to [v, C] in the dtype of the rows; for the gradient as above."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, bags: Bags) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.bags, ctx.unpacked = bags, None
        rows, weights = rows.detach(), weights.detach()
        if rows.dtype == weights.dtype:
            return sum_bags(rows, bags, weights)
        return sum_bags(rows * weights.unsqueeze(-1), bags).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weights = _unpacked(ctx)
        gradient = grads[0].to(torch.promote_types(rows.dtype, weights.dtype))[ctx.bags.bag]
        of_weights = (gradient * rows).sum(-1).to(weights.dtype) if ctx.needs_input_grad[1] else None
        return (gradient * weights.unsqueeze(-1)).to(rows.dtype), of_weights, None


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
    """Exchanges of a dispatch that are under way.

    Attributes:
        rows: of tokens.
        weights: of the router's; None where only a backward would need them, and there is none.
        pairs: of which row each pair belongs to; None where each has its own.
    """

    rows: Flight
    weights: Flight | None
    pairs: Flight | None = None


class Arrived(NamedTuple):
    """What `combine` has to know of the rows that the experts compute, beside the rows.

    Attributes:
        weights: [R] of the router; None where nobody needs them here.
        bags: of the pairs of each row that arrived; None where each has its own.
    """

    weights: Tensor | None = None
    bags: Bags | None = None


def launch_dispatch(x: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup) -> Dispatched:
    """Start the exchanges of `dispatch`, which `land_dispatch` ends."""
    assert route.send is not None and route.receive is not None
    bundles, top_k = route.bundles, weights.shape[-1]
    # Inside, expert parameters get 1 / ep of their gradient; see `dispatch`.
    x = _ScaleGradient.apply(x, float(len(route.send)))
    if bundles is None:
        flight, told = launch(_RepeatTokens.apply(x, route, top_k), group, route.send, route.receive), None
        if not torch.is_grad_enabled():
            return Dispatched(flight, None)
    else:
        flight = launch(Spread.apply(x, bundles.by_token), group, bundles.send, bundles.receive)
        told = launch_data(bundles.rows_of_pairs(route.order // top_k), group, route.send, route.receive)
    pairs = _Reorder.apply(weights.reshape(-1), route.order, route.inverse)
    return Dispatched(flight, launch(pairs, group, route.send, route.receive), told)


def land_dispatch(flights: Dispatched, route: Route) -> tuple[Tensor, Arrived]:
    back, rows = _invert(route.arrival), land(flights.rows)
    if route.bundles is None or flights.pairs is None:
        rows, bags = _Reorder.apply(rows, route.arrival, back), None
    else:
        bags = route.bundles.by_row(flights.pairs.wait(), route.arrival)
        rows = Spread.apply(rows, bags)
    weights = None if flights.weights is None else _Reorder.apply(land(flights.weights), route.arrival, back)
    return rows, Arrived(weights, bags)


def dispatch(x: Tensor, weights: Tensor, route: Route, group: dist.ProcessGroup | None) -> tuple[Tensor, Arrived]:
    """The rows that this rank's experts work on, sorted by local expert, and what `combine` needs of them.

    Args:
        x: local tokens [t, C].
        weights: router weights [t, K] of this rank's tokens.

    Returns:
        Local tensor [R, C], and its weights [R] for `combine`. The rows' gradient is multiplied by ep on the way back,
        and that of `combine` divided: inside, expert parameters get 1 / ep of their gradient. FSDP averages them over
        efsdp and dp_replicate only, and with this factor that is the average over all ranks that sent tokens, for any
        reduction that FSDP knows.

    Collective: two all-to-alls over `group`, of rows and of weights; their backward is the reverse. In bundles one
    more, of integers, which has no backward.
    """
    if group is None:
        return _RepeatTokens.apply(x, route, weights.shape[-1]), Arrived()
    flights = launch_dispatch(x, weights, route, group)
    give_way()
    return land_dispatch(flights, route)


@torch.compiler.disable  # a compiler knows no nodes of the graph
def launch_combine(rows: Tensor, arrived: Arrived, route: Route, group: dist.ProcessGroup) -> Flight:
    """Start the exchange of `combine`, which `land_combine` ends."""
    assert route.send is not None and route.receive is not None
    rows, (weights, bags), bundles = _ScaleGradient.apply(rows, 1.0 / len(route.send)), arrived, route.bundles
    if weights is not None:
        rows = _WeighGradient.apply(rows, weights) if bags is None else _WeighBags.apply(rows, weights, bags)
    meanwhile = partial(unpack, rows.grad_fn) if weights is not None and rows.requires_grad else None
    if bundles is not None:
        return launch(rows, group, bundles.receive, bundles.send, meanwhile)
    rows = _Reorder.apply(rows, _invert(route.arrival), route.arrival)
    return launch(rows, group, route.receive, route.send, meanwhile)


def land_combine(flight: Flight, weights: Tensor, route: Route) -> Tensor:
    if route.bundles is not None:
        return SumBags.apply(land(flight), route.bundles.by_token)
    return _SumWeighed.apply(land(flight), weights.detach(), route)


def combine(rows: Tensor, arrived: Arrived, weights: Tensor, route: Route, group: dist.ProcessGroup | None) -> Tensor:
    """The experts' outputs, weighed and summed for each token of this rank; the inverse of `dispatch`.

    Args:
        rows: local tensor [R, C], sorted by local expert.
        arrived: as `dispatch` returns it.
        weights: router weights [t, K] of this rank's tokens.

    Returns:
        Local tensor [t, C] in the dtype of the weighed sum; of bundles in that of the rows.

    Collective: one all-to-all over `group`; its backward is the reverse.
    """
    if group is None:
        return _sum_weighed(_Reorder.apply(rows, route.inverse, route.order), weights)
    flight = launch_combine(rows, arrived, route, group)  # pyright: ignore[reportCallIssue]
    give_way()
    return land_combine(flight, weights, route)
