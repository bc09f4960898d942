"""Batches of samples under a token budget, of equal cost over the data ranks, resumable in the middle of an epoch.

n samples, R data ranks. An epoch is planned by every rank for itself, in the same way and without communication:

    shuffle -> batches of at most max_tokens (best-fit decreasing) -> as many batches as R divides
            -> sort by cost, R neighbours make a step -> even out the step's batches -> shuffle the steps

Sizes are all that best-fit looks at, so every epoch has the same number of batches.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from hf_veomni.data.planning import best_fit, members

_EVEN_ENOUGH = 1.01  # a step whose most expensive batch is within 1 % of the mean is left alone

Batch = np.ndarray  # sample indices
Step = list[Batch]  # one batch for each data rank


def attention_cost(lengths: Any, hidden_size: int, layer_parameters: int | None = None) -> np.ndarray:
    """What training on a document costs, in units of a token without attention: length + length^2 * hidden / params.

    A layer multiplies each token with its weights, 2 * layer_parameters operations, and a causal query meets half of
    its document, 2 * hidden_size * length operations a token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1, with
    the causal half).

    Args:
        lengths: tokens of each sample, [n]; or for packed sequences the lengths of their documents (the column
            `document_lengths`), a list of lists, since documents do not attend to each other.
        hidden_size: heads times head dimension of a layer.
        layer_parameters: weights of a layer that one token uses; default 12 * hidden_size ** 2 (a dense layer).

    Returns:
        Cost of each sample, float64 [n].
    """
    weights = 12 * hidden_size**2 if layer_parameters is None else layer_parameters
    nested = len(lengths) > 0 and np.ndim(lengths[0]) == 1
    documents = np.concatenate([np.asarray(row) for row in lengths]) if nested else np.asarray(lengths)
    costs = documents + documents.astype(np.float64) ** 2 * (hidden_size / weights)
    if not nested:
        return costs
    sizes = np.array([len(row) for row in lengths])
    return np.add.reduceat(costs, np.cumsum(sizes) - sizes)


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of sample indices: at most `max_tokens` tokens each, near equal cost on all data ranks in every step.

    Every data rank gets the same number of batches, `len()` of them, in every epoch. No sample is lost or seen twice
    in an epoch, with one exception for each choice of `drop_last`: the batches that are left over when R does not
    divide their number are dropped (`drop_last=True`, at most R - 1 batches, another choice each epoch), or some are
    split in two until R does (the default); if there are too few samples for that, the least expensive are repeated.

    It goes into `DataLoader(dataset, batch_sampler=sampler, collate_fn=OmniDataCollatorWithPacking(max_tokens))`:

    - `rank=r`: the batches of data rank r. The loader is used as it is, for example returned by `get_train_dataloader`
      of a Trainer; `accelerator.prepare` would shard it once more.
    - `rank=None`: the batches of all data ranks in turn, (step 0, rank 0), (step 0, rank 1), ... That is how
      accelerate assigns the batches of a loader given to `accelerator.prepare`, so each data rank gets those meant
      for it. `len()` is then R times as large.

    `set_epoch` before every epoch: a prepared loader and the Trainer do it (accelerate 1.15 does not reach the sampler
    of a loader from `skip_first_batches`: do it yourself there). A Trainer saves nothing of the sampler: it leaves out
    the batches of a resumed epoch by their indices alone. A loop of one's own saves `state_dict()`.

    Args:
        lengths_or_costs: tokens of each sample, [n]; or costs, if `lengths` is given.
        max_tokens: token budget of a batch.
        num_ranks: number of data ranks, R (`ParallelState.dp_size`; the ranks of an SP group are one data rank).
        rank: this data rank (`ParallelState.dp_rank`), or None for all ranks in turn.
        seed: the order is a function of (seed, epoch).
        lengths: tokens of each sample, [n], when the first argument holds costs such as `attention_cost(lengths, H)`.
        shuffle: False keeps the order of the samples as far as batches and steps allow.
        drop_last: see above.

    Raises:
        ValueError: a sample longer than `max_tokens`, sizes that do not agree, a rank outside of `num_ranks`.
    """

    def __init__(
        self,
        lengths_or_costs: ArrayLike,
        max_tokens: int,
        num_ranks: int = 1,
        rank: int | None = 0,
        seed: int = 0,
        *,
        lengths: ArrayLike | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        self.costs = np.asarray(lengths_or_costs, dtype=np.float64)
        self.lengths = np.asarray(lengths_or_costs if lengths is None else lengths)
        self.max_tokens, self.num_ranks, self.rank = max_tokens, num_ranks, rank
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self._check()
        self.epoch = 0
        self.batch_size = None  # accelerate reads it: batches differ in size
        self._done: list[tuple[int, int, int]] = []  # (ranks, max_tokens, steps) of earlier parts of this epoch
        self._yielded = 0  # batches of this rank (or of all ranks) since those parts
        self._resume = 0  # steps that the next iteration leaves out
        self._loaded = False  # a loaded state waits for the next iteration
        self._planned: tuple[Any, list[Step]] | None = None
        if drop_last and not self._steps():
            raise ValueError(
                f"`drop_last` leaves nothing: {len(self.lengths)} samples make fewer batches of {max_tokens} tokens "
                f"than `num_ranks` ({num_ranks}); lower `max_tokens` or leave `drop_last` out."
            )

    def _check(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("num_ranks", self.num_ranks)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")
        if self.rank is not None and not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"`rank` ({self.rank}) must be one of 0..{self.num_ranks - 1}, or None for all in turn.")
        if self.lengths.ndim != 1 or self.lengths.shape != self.costs.shape or not self.lengths.size:
            raise ValueError(
                f"Costs {list(self.costs.shape)} and `lengths` {list(self.lengths.shape)} must hold one number for "
                "each sample, and at least one."
            )
        if self.lengths.dtype.kind not in "iu":
            raise ValueError(
                f"Lengths of type {self.lengths.dtype} must be integers of tokens: if they are costs, give the "
                "lengths too (`lengths=`)."
            )
        self.lengths = self.lengths.astype(np.int64)
        for wrong, rule in (
            (self.lengths < 1, "must have at least one token: remove it"),
            (
                self.lengths > self.max_tokens,
                f"must fit `max_tokens` ({self.max_tokens}): raise it, or split documents",
            ),
            (~(np.isfinite(self.costs) & (self.costs > 0)), "must have a finite cost above 0"),
        ):
            if wrong.any():
                index = int(wrong.argmax())
                raise ValueError(f"sample {index} ({self.lengths[index]} tokens, cost {self.costs[index]:g}) {rule}.")

    @property
    def batch_sampler(self) -> BalancedBatchSampler:
        """Itself: accelerate and the Trainer pass `set_epoch` on to what a sampler wraps, not to the sampler."""
        return self

    sampler = batch_sampler

    def __len__(self) -> int:
        steps = sum(steps for _, _, steps in self._done) + len(self._steps())
        return steps * (self.num_ranks if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        if not self._loaded:
            self._done = []  # a new pass, not the rest of a resumed one
        first, self._resume, self._loaded = self._resume, 0, False
        steps = self._steps()
        ranks = range(self.num_ranks) if self.rank is None else (self.rank,)
        self._yielded = first * len(ranks)
        for step in steps[first:]:
            for rank in ranks:
                self._yielded += 1
                yield step[rank].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        Raises:
            ValueError: a loaded state waits for another epoch: going on would silently replay that one.
        """
        if epoch == self.epoch:
            return
        if self._loaded and self._resume < len(self._steps()):
            raise ValueError(
                f"Epoch {epoch} is set while the loaded state stands in epoch {self.epoch}: begin there, with "
                f"set_epoch({self.epoch}) on the loader (a loader prepared by accelerate counts from 0 by itself)."
            )
        self.epoch, self._done, self._yielded, self._resume, self._loaded = epoch, [], 0, 0, False

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Where the epoch stands. The same on every data rank, so one rank's state serves all.

        Args:
            steps: batches of this epoch that each data rank has trained on. Default: as many as this sampler has
                handed out, which is more than were trained on when a loader reads ahead (DataLoader workers, and
                accelerate by one batch): give the number there.
        """
        current = self._yielded // (self.num_ranks if self.rank is None else 1)
        if steps is not None:
            current = steps - sum(steps for _, _, steps in self._done)
            if current < 0:
                raise ValueError(f"`steps` ({steps}) lies before the state that this epoch was resumed from.")
        parts = [*self._done, (self.num_ranks, self.max_tokens, current)]
        return {"epoch": self.epoch, "parts": [list(part) for part in parts], **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stands; nothing that was trained on is read again.

        `num_ranks` and `max_tokens` may differ from those of the state: the samples that are left of the epoch are
        then planned anew for the present ones, still without loss or repetition.

        Raises:
            ValueError: the state belongs to other samples, or to another seed, `shuffle` or `drop_last`.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"The state was saved with another `{name}` ({state.get(name)!r}, here {value!r}): resume with "
                    "the same dataset and options, or start the epoch again without load_state_dict."
                )
        *done, (num_ranks, max_tokens, steps) = (tuple(part) for part in state["parts"])
        if (num_ranks, max_tokens) != (self.num_ranks, self.max_tokens):
            done, steps = [*done, (num_ranks, max_tokens, steps)] if steps else done, 0
        self.epoch, self._done, self._resume, self._loaded = state["epoch"], done, steps, True
        self._yielded = steps * (self.num_ranks if self.rank is None else 1)

    def _identity(self) -> dict[str, Any]:
        data = hashlib.sha256(self.lengths.tobytes() + self.costs.tobytes()).hexdigest()[:16]
        return {"seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last, "samples": data}

    def _steps(self) -> list[Step]:
        """The steps of this epoch after the parts that are done."""
        key = (self.epoch, tuple(self._done))
        if self._planned is None or self._planned[0] != key:
            rest = np.arange(len(self.lengths))
            for num_ranks, max_tokens, count in self._done:
                gone = [batch for step in self._plan(rest, num_ranks, max_tokens)[:count] for batch in step]
                rest = np.setdiff1d(rest, np.concatenate(gone))
            self._planned = key, self._plan(rest, self.num_ranks, self.max_tokens)
        return self._planned[1]

    def _plan(self, samples: np.ndarray, num_ranks: int, max_tokens: int) -> list[Step]:
        if not samples.size:
            return []
        random = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            samples = random.permutation(samples)
        order, sizes = members(best_fit(self.lengths[samples], max_tokens))
        batches = np.split(samples[order], np.cumsum(sizes)[:-1])
        if self.drop_last:
            kept = len(batches) // num_ranks * num_ranks
            chosen = random.permutation(len(batches))[:kept] if self.shuffle else range(kept)
            batches = [batches[index] for index in sorted(chosen)]
        else:
            batches = self._fill_up(batches, -len(batches) % num_ranks, max_tokens)
        costs = np.array([self.costs[batch].sum() for batch in batches])
        ranked = np.argsort(costs, kind="stable")
        steps = []
        for group in ranked.reshape(-1, num_ranks):
            step = self._even_out([batches[index] for index in group], max_tokens)
            steps.append([step[index] for index in random.permutation(num_ranks)] if self.shuffle else step)
        if self.shuffle:
            return [steps[index] for index in random.permutation(len(steps))]
        return sorted(steps, key=lambda step: min(int(batch.min()) for batch in step))

    def _fill_up(self, batches: list[Batch], missing: int, max_tokens: int) -> list[Batch]:
        """Split the most expensive batches until `missing` more are there; when only single samples are left, repeat
        some."""
        costly = [(-self.costs[batch].sum(), index) for index, batch in enumerate(batches) if len(batch) > 1]
        heapq.heapify(costly)
        batches = list(batches)
        while missing and costly:
            _, index = heapq.heappop(costly)
            halves = self._assign(batches[index], 2, max_tokens)
            batches[index] = halves[0]
            batches.append(halves[1])
            for new in (index, len(batches) - 1):
                if len(batches[new]) > 1:
                    heapq.heappush(costly, (-self.costs[batches[new]].sum(), new))
            missing -= 1
        least = sorted(batches, key=lambda batch: self.costs[batch].sum())
        return batches + [least[index % len(least)] for index in range(missing)]

    def _even_out(self, step: Step, max_tokens: int) -> Step:
        """Assign the samples of a step anew if that lowers the cost of its most expensive batch."""
        costs = [self.costs[batch].sum() for batch in step]
        if max(costs) <= _EVEN_ENOUGH * np.mean(costs):
            return step
        assigned = self._assign(np.concatenate(step), len(step), max_tokens)
        better = assigned and max(self.costs[batch].sum() for batch in assigned) < max(costs)
        return assigned if better else step

    def _assign(self, samples: np.ndarray, parts: int, max_tokens: int) -> list[Batch]:
        """Longest-processing-time rule (Graham 1969): the most expensive sample first, to the least expensive part
        that has room.

        Returns an empty list if a part stays empty or a sample finds no room.
        """
        costs, tokens = np.zeros(parts), np.zeros(parts, dtype=np.int64)
        assigned: list[list[int]] = [[] for _ in range(parts)]
        for sample in samples[np.argsort(-self.costs[samples], kind="stable")].tolist():
            room = tokens + self.lengths[sample] <= max_tokens
            if not room.any():
                return []
            part = int(np.where(room, costs, np.inf).argmin())
            costs[part] += self.costs[sample]
            tokens[part] += self.lengths[sample]
            assigned[part].append(sample)
        return [np.array(part) for part in assigned] if all(assigned) else []
