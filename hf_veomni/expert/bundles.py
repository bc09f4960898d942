"""A token's pairs for one rank as one row: sent once, however many of its experts live there, and back as one sum.

    x [t, C] -> a row for each rank that has an expert of the token [u, C] -> all-to-all [v, C]
             -> spread over the pairs [R, C] -> experts -> weigh, sum over the pairs of a row [v, C]
    [t, C]   <- sum over the ranks <- all-to-all [u, C]                             <-

Top-8 of 128 experts on 8 ranks: 5.3 rows a token in place of 8. Which pairs a row stands for goes along, 4 bytes a
pair, and the router weights, which are needed where the experts are. The backward is the same in reverse: the gradient
of a token goes once to each of those ranks, where it is weighed, and comes back as one sum.

Sums run in another order than those of one row a pair: first over the experts of a rank, then over the ranks. In bf16
what a rank has summed, in fp32 where the weights are, is rounded on the way home.

Shapes: t tokens of this rank, P pairs; u rows that it sends, v that it gets, R pairs of the latter; C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bags(NamedTuple):
    """Which items belong together.

    Attributes:
        bag: [n] of each item.
        items: [n], sorted by bag.
        starts: [b] where each bag begins in `items`.
    """

    bag: Tensor
    items: Tensor
    starts: Tensor

    @classmethod
    def of(cls, bag: Tensor, number: int) -> Bags:
        """From the bag of each item, [items], and how many bags there are."""
        items = torch.argsort(bag, stable=True)
        return cls(bag, items, torch.searchsorted(bag[items], torch.arange(number, device=bag.device)))


@dataclass(frozen=True, eq=False)
class Bundles:
    """The rows that one chunk of tokens sends.

    Attributes:
        hits: bool [ranks, t], whether a token has an expert on a rank.
        pairs: [ranks] for each rank.
        arriving: [ranks] rows, and `arriving_pairs` pairs, from each rank.
        send, receive: rows exchanged with each rank.
    """

    hits: Tensor
    pairs: Tensor
    arriving: Tensor
    arriving_pairs: Tensor
    send: list[int]
    receive: list[int]

    @cached_property
    def _place(self) -> Tensor:
        """[ranks, t] place of each row, where there is one."""
        return (self.hits.flatten().cumsum(0) - 1).view_as(self.hits)

    @cached_property
    def by_token(self) -> Bags:
        """The rows that leave, in the order of the ranks; a bag for each token."""
        (ranks, tokens), number = self.hits.shape, sum(self.send)
        token = torch.arange(tokens, device=self.hits.device).repeat(ranks)
        token = token.repeat_interleave(self.hits.flatten().long(), output_size=number)
        counts = self.hits.sum(0)
        rows = self._place.T.flatten().repeat_interleave(self.hits.T.flatten().long(), output_size=number)
        return Bags(token, rows, counts.cumsum(0) - counts)

    def rows_of_pairs(self, tokens: Tensor) -> Tensor:
        """int32 [P], of pairs in the order of the experts: which of the rows that go to its rank each belongs to."""
        ranks, counts = len(self.hits), self.hits.sum(1)
        rank = torch.arange(ranks, device=tokens.device).repeat_interleave(self.pairs, output_size=len(tokens))
        first = counts.cumsum(0) - counts
        return (self._place[rank, tokens] - first[rank]).int()

    def by_row(self, came: Tensor, arrival: Tensor) -> Bags:
        """The pairs that arrive, in the order `arrival` of the local experts; a bag for each row.

        Args:
            came: int32 [R], what the ranks' `rows_of_pairs` say.
        """
        first = self.arriving.cumsum(0) - self.arriving
        first = first.repeat_interleave(self.arriving_pairs, output_size=len(came))
        return Bags.of((came + first)[arrival], sum(self.receive))


def count_hits(ranks_of: Tensor, ranks: int) -> Tensor:
    """`Bundles.hits`. `ranks_of`: [t, K] rank of each pair's expert."""
    hits = torch.zeros(ranks, len(ranks_of), dtype=torch.bool, device=ranks_of.device)
    return hits.scatter_(0, ranks_of.T, True)


def sum_bags(rows: Tensor, bags: Bags, weights: Tensor | None = None) -> Tensor:
    """[n, C] to [b, C], one kernel that adds in the order of the items; weights [n] in the dtype of the rows."""
    if not len(rows):
        return rows.new_zeros(len(bags.starts), rows.shape[-1])
    each = None if weights is None else weights[bags.items]
    return F.embedding_bag(bags.items, rows, bags.starts, mode="sum", per_sample_weights=each)


class Spread(torch.autograd.Function):
    """Rows [b, C] to items [n, C]; the gradient of a row is the sum of its items'."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bags: Bags) -> Tensor:
        ctx.bags = bags
        return rows[bags.bag]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_bags(grads[0], ctx.bags), None


class SumBags(torch.autograd.Function):
    """Items [n, C] to sums [b, C]."""

    @staticmethod
    def forward(ctx: Any, items: Tensor, bags: Bags) -> Tensor:
        ctx.bags = bags
        return sum_bags(items.detach(), bags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.bags.bag], None
