"""Full items to the ranks of a group, or samples to data ranks, so that the slowest rank is near the mean. Pure.

n items with a cost each, m ranks. Load of a rank: the sum of its items' costs; a step takes as long as the largest.

    LPT -> local search -> (if not within 0.1 % of the bound) Karmarkar-Karp -> local search -> the better of the two
        -> (still not, and few items) depth-first search of a bounded number of nodes

Nothing here communicates: every rank computes the same assignment from the same costs. Ties go by index, ranks are
numbered in the order of their first item, and the largest load depends on the costs only, not on their order.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_veomni.data import BalancedBatchSampler

_NEAR = 1.001  # an assignment within 0.1 % of the lower bound is not worth more search
_SWEEPS = 200  # moves and swaps of one local search: 64 items need about 10
_DIFFERENCED = 20_000  # n * m up to which Karmarkar-Karp is quick (20 ms)
_SEARCHED, _NODES = 24, 1_500  # items up to which the depth-first search may help, and nodes it may visit (2 ms)


@dataclass(frozen=True)
class Assignment:
    """Which rank has which item, and the way back.

    Attributes:
        rank_of: rank of each item, int64 [n].
        num_ranks: ranks, some of which may have no item.
        order: the items rank after rank, by index within a rank, int64 [n].
        counts: items of each rank, int64 [num_ranks].
    """

    rank_of: np.ndarray
    num_ranks: int
    order: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_ranks(cls, rank_of: object, num_ranks: int) -> Assignment:
        """From the rank of each item, [n]."""
        rank_of = np.asarray(rank_of, dtype=np.int64)
        counts = np.bincount(rank_of, minlength=num_ranks)
        return cls(rank_of, num_ranks, np.argsort(rank_of, kind="stable"), counts)

    @property
    def inverse(self) -> np.ndarray:
        """Place of each item in `order`, int64 [n]: `concatenated[inverse]` is in the order of the items."""
        places = np.empty(len(self.order), dtype=np.int64)
        places[self.order] = np.arange(len(self.order))
        return places

    def items(self, rank: int) -> np.ndarray:
        """Items of a rank, ascending."""
        end = int(self.counts[: rank + 1].sum())
        return self.order[end - int(self.counts[rank]) : end]

    def num_rows(self, sizes: ArrayLike) -> np.ndarray:
        """Rows of each rank, int64 [num_ranks], for items of `sizes` rows, [n]: the split sizes of an exchange."""
        sizes = np.asarray(sizes, dtype=np.int64)
        return np.array([sizes[self.items(rank)].sum() for rank in range(self.num_ranks)], dtype=np.int64)

    def restore(self, sizes: ArrayLike) -> np.ndarray:
        """Where the rows of the items lie in the rows of all ranks in turn, int64 [sizes.sum()].

        `torch.cat(features_of_ranks)[restore(sizes)]` has the features in the order of the items.
        """
        sizes = np.asarray(sizes, dtype=np.int64)
        ends = np.cumsum(sizes[self.order])
        begins = (ends - sizes[self.order])[self.inverse]
        return np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())

    def loads(self, costs: ArrayLike) -> np.ndarray:
        """Load of each rank, float64 [num_ranks], rounded once: it does not depend on the order of its items."""
        costs = np.asarray(costs, dtype=np.float64)
        return np.array([math.fsum(costs[self.items(rank)].tolist()) for rank in range(self.num_ranks)])


def assign_items(
    costs: ArrayLike, num_ranks: int, *, patches: ArrayLike | None = None, max_patches: int | None = None
) -> Assignment:
    """Give each item to one rank so that the largest load is near the lower bound.

    Never worse than LPT, so at most 4/3 - 1/(3m) of the optimum without a limit (Graham 1969); an item of cost 0 goes
    where the fewest items are.

    Args:
        costs: cost of each item, [n], any unit (`CostModel.costs`).
        num_ranks: m, ranks of the group.
        patches: patches of each item, [n], with `max_patches`.
        max_patches: what a rank may hold, a limit of its memory.

    Returns:
        The assignment; ranks without items come last.

    Raises:
        ValueError: a cost that is negative or not finite; a limit that the items do not fit.

    Source: LPT, Graham 1969 (SIAM J. Appl. Math. 17, 416-429); differencing, Karmarkar and Karp 1982 (UCB/CSD-82-113).
    """
    costs, patches = _checked(costs, num_ranks, patches, max_patches)
    limit = math.inf if max_patches is None else max_patches
    order = np.lexsort((-patches, -costs))  # stable: equal items stay in the order of their index
    c, p = costs[order], patches[order]
    goal = _NEAR * lower_bound(c, num_ranks)
    ranks = _refine(c, p, _place(c, p, num_ranks, limit), num_ranks, limit, goal)
    best = _largest(c, ranks)
    if best > goal and limit == math.inf:
        others = [_difference] if len(c) * num_ranks <= _DIFFERENCED else []
        others += [_search] if len(c) <= _SEARCHED else []
        for other in others:
            found = other(c, num_ranks, best)
            found = None if found is None else _refine(c, p, found, num_ranks, limit, goal)
            if found is not None and _largest(c, found) < best:
                ranks, best = found, _largest(c, found)
            if best <= goal:
                break
    rank_of = np.empty(len(c), dtype=np.int64)
    rank_of[order] = ranks
    return Assignment.from_ranks(_by_first_item(rank_of), num_ranks)


def assign_samples(
    costs: Any, lengths: Any, max_tokens: int, num_data_ranks: int, *, seed: int = 0, epoch: int = 0, **options: Any
) -> list[list[np.ndarray]]:
    """The steps of an epoch: BalancedBatchSampler's own, each evened out by the local search of `assign_items`.

    For training give `BalancedBatchSampler(costs, max_tokens, lengths=lengths)` itself the costs of a `CostModel`, the
    sum over all modalities of a sample: it assigns steps by LPT, and resumes.

    Args:
        costs: cost of each sample, [n].
        lengths: tokens of each sample, [n], the budget's unit.
        max_tokens: of a batch.
        num_data_ranks: batches of a step.
        seed, epoch, options: as BalancedBatchSampler has them (`shuffle`, `drop_last`).

    Returns:
        [steps][num_data_ranks] arrays of sample indices, ascending.
    """
    sampler = BalancedBatchSampler(costs, max_tokens, num_data_ranks, None, seed, lengths=lengths, **options)
    sampler.set_epoch(epoch)
    batches = [np.array(batch) for batch in sampler]
    steps = []
    for first in range(0, len(batches), num_data_ranks):
        step = batches[first : first + num_data_ranks]
        samples = np.concatenate(step)
        ranks = np.repeat(np.arange(num_data_ranks), [len(batch) for batch in step])
        c, tokens = sampler.costs[samples], sampler.lengths[samples].astype(np.float64)
        goal = _NEAR * lower_bound(c, num_data_ranks)
        ranks = _refine(c, tokens, ranks, num_data_ranks, max_tokens, goal)
        steps.append([np.sort(samples[ranks == rank]) for rank in range(num_data_ranks)])
    return steps


def lower_bound(costs: ArrayLike, num_ranks: int) -> float:
    """What the largest load cannot be below: the mean, the most expensive item, and k + 1 of the first k * m + 1
    items.

    The last: of the k * m + 1 most expensive items some rank has k + 1, which cost at least what the least expensive
    of them do.
    """
    c = np.sort(np.asarray(costs, dtype=np.float64))[::-1]
    if not len(c):
        return 0.0
    together = [c[k * num_ranks - k : k * num_ranks + 1].sum() for k in range((len(c) - 1) // num_ranks + 1)]
    return float(max(math.fsum(c.tolist()) / num_ranks, *together, 0.0))


@dataclass(frozen=True)
class BalanceReport:
    """Largest load over mean load: 1 is perfect, 2 means that the ranks wait half of the time.

    Attributes:
        num_items, num_ranks: what was assigned.
        contiguous: equal numbers of neighbouring items a rank.
        round_robin: items assigned in turn.
        balanced: the assignment.
        bound: what no assignment can be below.
    """

    num_items: int
    num_ranks: int
    contiguous: float
    round_robin: float
    balanced: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.num_items} items on {self.num_ranks} ranks, max/mean cost: contiguous {self.contiguous:.3f}, "
            f"round-robin {self.round_robin:.3f}, balanced {self.balanced:.3f} (no less than {self.bound:.3f})"
        )


def balance_report(costs: ArrayLike, assignment: Assignment) -> BalanceReport:
    """Compare an assignment with the two that look at no cost.

    Raises:
        ValueError: costs of another number of items.
    """
    costs = np.asarray(costs, dtype=np.float64)
    n, m = len(assignment.rank_of), assignment.num_ranks
    if costs.shape != (n,):
        raise ValueError(f"`costs` {list(costs.shape)} must have one number for each of the {n} assigned items.")
    mean = math.fsum(costs.tolist()) / m
    blocks = np.repeat(np.arange(m), [len(part) for part in np.array_split(np.arange(n), m)])

    def over_mean(one: Assignment) -> float:
        return float(one.loads(costs).max() / mean) if mean else 1.0

    return BalanceReport(
        num_items=n,
        num_ranks=m,
        contiguous=over_mean(Assignment.from_ranks(blocks, m)),
        round_robin=over_mean(Assignment.from_ranks(np.arange(n) % m, m)),
        balanced=over_mean(assignment),
        bound=lower_bound(costs, m) / mean if mean else 1.0,
    )


def _checked(
    costs: ArrayLike, num_ranks: int, patches: ArrayLike | None, max_patches: int | None
) -> tuple[np.ndarray, np.ndarray]:
    costs = np.asarray(costs, dtype=np.float64)
    if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
        raise ValueError(f"`num_ranks` ({num_ranks!r}) must be a positive integer.")
    wrong = ~(np.isfinite(costs) & (costs >= 0))
    if costs.ndim != 1 or wrong.any():
        value = costs.tolist() if costs.ndim != 1 else f"item {wrong.argmax()}: {costs[wrong.argmax()]:g}"
        raise ValueError(f"`costs` ({value}) must be one number for each item, finite and not negative.")
    if (patches is None) != (max_patches is None):
        raise ValueError("`patches` and `max_patches` go together: give both for a limit, or neither.")
    if patches is None or max_patches is None:
        return costs, np.zeros(len(costs))
    patches = np.asarray(patches, dtype=np.float64)
    if patches.shape != costs.shape or not (np.isfinite(patches) & (patches >= 0)).all():
        raise ValueError(
            f"`patches` ({patches.tolist()}) must be one number for each of the {len(costs)} items, >= 0."
        )
    if len(patches) and patches.max() > max_patches:
        raise ValueError(
            f"Item {patches.argmax()} has {patches.max():g} patches, above `max_patches` ({max_patches}): raise it, "
            "resize the item, or split it over the ranks (Ulysses in the tower)."
        )
    return costs, patches


def _place(c: np.ndarray, p: np.ndarray, num_ranks: int, limit: float) -> np.ndarray:
    """LPT: the most expensive item first, to the least expensive rank with room; under a limit, else the largest
    first."""
    for first in (range(len(c)), np.argsort(-p, kind="stable").tolist()):
        by_room = not isinstance(first, range)
        ranks, full = np.zeros(len(c), dtype=np.int64), [0.0] * num_ranks
        heap = [(0.0, 0, rank) for rank in range(num_ranks)]  # (load, items, rank)
        for item in first:
            aside = []
            while heap and full[heap[0][2]] + p[item] > limit:
                aside.append(heapq.heappop(heap))
            if not heap:
                break
            load, held, rank = heap[0]
            full[rank] += float(p[item])
            heapq.heapreplace(heap, (load + float((p if by_room else c)[item]), held + 1, rank))
            for entry in aside:
                heapq.heappush(heap, entry)
            ranks[item] = rank
        else:
            return ranks
    raise ValueError(
        f"Found no place for {len(c)} items of {p.sum():g} patches on {num_ranks} ranks of `max_patches` ({limit:g}) "
        f"each, {num_ranks * limit:g} in all: raise it, use more ranks or fewer items a row."
    )


def _refine(c: np.ndarray, p: np.ndarray, ranks: np.ndarray, num_ranks: int, limit: float, goal: float) -> np.ndarray:
    """Moves and swaps out of the most expensive rank, the best one each time, until none helps.

    A move is a swap with nothing. What counts is the more expensive of the two ranks afterwards; since it is below the
    load that the most expensive rank had, the sum of squared loads falls and the search ends. No rank loses its last
    item.
    """
    ranks = ranks.copy()
    nothing = np.zeros(num_ranks)
    for _ in range(_SWEEPS):
        loads = np.bincount(ranks, c, num_ranks)
        worst = int(loads.argmax())
        if loads[worst] <= goal:
            break
        own, others = np.flatnonzero(ranks == worst), np.flatnonzero(ranks != worst)
        to = np.concatenate([ranks[others], np.arange(num_ranks)])
        change = c[own, None] - np.concatenate([c[others], nothing])
        after = np.maximum(loads[worst] - change, loads[to] + change)
        after[:, len(others) + worst] = np.inf
        if limit < math.inf:
            held = np.bincount(ranks, p, num_ranks)
            rows = p[own, None] - np.concatenate([p[others], nothing])
            after[(held[worst] - rows > limit) | (held[to] + rows > limit)] = np.inf
        item, other = divmod(int(after.argmin()), after.shape[1])
        if not after[item, other] < loads[worst] * (1 - 1e-12):
            break
        ranks[own[item]] = to[other]
        if other < len(others):
            ranks[others[other]] = worst
    return ranks


def _difference(c: np.ndarray, num_ranks: int, best: float) -> np.ndarray:
    """Largest differencing: of the two partial partitions with the widest spread, most expensive parts meet least
    expensive ones."""
    del best
    empty: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (num_ranks - 1)
    heap = [(-cost, item, [*empty, (cost, (item,))]) for item, cost in enumerate(c.tolist())]
    heapq.heapify(heap)
    for joined in range(len(c), 2 * len(c) - 1):
        _, _, one = heapq.heappop(heap)
        _, _, two = heapq.heappop(heap)
        parts = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(two), strict=True)]
        parts.sort(key=lambda part: part[0])
        least = parts[0][0]
        parts = [(load - least, items) for load, items in parts]
        heapq.heappush(heap, (-parts[-1][0], joined, parts))
    ranks = np.zeros(len(c), dtype=np.int64)
    for rank, (_, items) in enumerate(heap[0][2]):
        ranks[list(items)] = rank
    return ranks


def _search(c: np.ndarray, num_ranks: int, best: float) -> np.ndarray | None:
    """Depth first, least expensive rank first (Korf 1998), leaving out what cannot beat `best`; None if nothing
    does."""
    costs, loads, ranks = c.tolist(), [0.0] * num_ranks, [0] * len(c)
    goal, nodes = lower_bound(c, num_ranks) * (1 + 1e-12), _NODES
    found: list[int] | None = None

    def visit(item: int) -> None:
        nonlocal nodes, best, found
        if item == len(costs):
            best, found = max(loads), ranks.copy()
            return
        tried: set[float] = set()
        for load, rank in sorted(zip(loads, range(num_ranks), strict=True)):
            if nodes <= 0 or best <= goal or load + costs[item] >= best * (1 - 1e-12):
                return
            if load in tried:  # ranks of equal load are the same
                continue
            tried.add(load)
            nodes -= 1
            loads[rank], ranks[item] = load + costs[item], rank
            visit(item + 1)
            loads[rank] = load

    visit(0)
    return None if found is None else np.array(found, dtype=np.int64)


def _largest(c: np.ndarray, ranks: np.ndarray) -> float:
    return float(np.bincount(ranks, c).max(initial=0.0))


def _by_first_item(ranks: np.ndarray) -> np.ndarray:
    """The same parts, numbered in the order of their first item."""
    _, first, part = np.unique(ranks, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[part]
