"""Which rows a rank reads. Data ranks get complete batches of their own, the ranks of an SP group the same ones.

Under a token budget `BalancedBatchSampler` makes the batches, in place of batches of so many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import has_length

from hf_veomni.data import BalancedBatchSampler, attention_cost
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState


class UnsplitBatches(BatchSamplerShard):
    """Every `num_processes`-th batch, as one process would have made it.

    accelerate fills a short last batch up with rows from the beginning, which then weigh twice. Here a batch stays as
    it is, and a data rank for which none is left runs the first batch once more as a dummy batch, to keep in step: its
    loss counts nothing in training, its outputs are cut off in evaluation.
    """

    @property
    def ends_with_dummy(self) -> bool:
        """Whether this rank's last batch is one that another rank had."""
        rest = len(self.batch_sampler) % self.num_processes
        return not self.drop_last and rest != 0 and self.process_index >= rest

    def __iter__(self) -> Iterator[list[int]]:
        first: list[int] = []
        mine: list[int] = []
        index = -1
        for index, batch in enumerate(self.batch_sampler):
            first = batch if index == 0 else first
            if index % self.num_processes == self.process_index:
                mine = batch
            if index % self.num_processes == self.num_processes - 1:
                yield mine
                mine = []
        if (index + 1) % self.num_processes and not self.drop_last:
            yield mine or first


class UnsplitStream(IterableDatasetShard):
    """Every `num_processes`-th batch of a stream, and no row twice: accelerate fills the last round up with rows from
    the beginning. A data rank may so get one batch less than another."""

    def __iter__(self) -> Iterator[Any]:
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)
        rows, start = iter(self.dataset), self.process_index * self.batch_size
        while turn := list(islice(rows, self.num_processes * self.batch_size)):
            if len(turn) == self.num_processes * self.batch_size or not self.drop_last:
                yield from turn[start : start + self.batch_size]


class InOrder(IterableDataset):
    """A stream that accelerate assigns in batches, as they come, and does not take apart by shards: so the rows of
    an evaluation have the order that one process would give them."""

    def __init__(self, dataset: Any) -> None:
        self.stream = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)


def keep_batches_unsplit(loader: Any) -> UnsplitBatches | None:
    """Turn the sharding that accelerate put on a loader into `UnsplitBatches` or `UnsplitStream`.

    Returns:
        The batch sampler of this rank, or None where accelerate did not shard (one data rank, a sampler that knows its
        rank) or sharded a stream.
    """
    if type(loader.dataset) is IterableDatasetShard:
        loader.dataset.__class__ = UnsplitStream
    sampler = getattr(loader, "batch_sampler", None)
    if type(sampler) is BatchSamplerShard and sampler.num_processes > 1:
        sampler.__class__ = UnsplitBatches
    return sampler if isinstance(sampler, UnsplitBatches) else None


class _CountingDataRanks:
    """accelerate's state for a loader that rank 0 reads and assigns: the rows go to data ranks."""

    def __init__(self, state: object, data_ranks: int) -> None:
        self._state, self.num_processes = state, data_ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def assign_to_data_ranks(loader: object, data_ranks: int, data_rank: int) -> None:
    """Let the ranks of an SP group have the same rows of a stream that rank 0 reads, which is what accelerate does
    with streams unless `dispatch_batches=False`. Other loaders stay as they are."""
    if not isinstance(loader, DataLoaderDispatcher):
        return
    dispatcher: Any = loader
    stock = dispatcher.slice_fn

    def slice_of_data_rank(data: object, wanted: slice, *args: object, **kwargs: object) -> Any:
        size = wanted.stop - wanted.start
        # accelerate counts processes; a slice from 0 on is that of rank 0, or the rows that fill up the last batch.
        return stock(
            data, slice(data_rank * size, (data_rank + 1) * size) if wanted.start else wanted, *args, **kwargs
        )

    dispatcher.state, dispatcher.slice_fn = _CountingDataRanks(dispatcher.state, data_ranks), slice_of_data_rank


class EpochSeeded(Sampler[int]):
    """A sampler that draws from a generator of its own, seeded by (seed, epoch): the same order on every rank, and
    after a resume in a later epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the innermost sampler; accelerate does not reach it through a loader that skips batches (a resume)."""
    sampler = loader
    for name in ("batch_sampler", "batch_sampler", "sampler"):
        sampler = getattr(sampler, name, sampler)
    if sampler is not loader and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


class DataRankView:
    """Training arguments that count data ranks: for Trainer's samplers, seeds of loader workers, and step counts."""

    def __init__(self, arguments: Any, state: ParallelState, process_index: int) -> None:
        self._arguments = arguments
        self.world_size, self.process_index = state.dp_size, process_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


class DummyBatch(dict):
    """A batch that only keeps a rank in step: its loss counts nothing."""

    @classmethod
    def of(cls, batch: Any) -> DummyBatch:
        return cls(batch)


_DOCUMENT_LENGTHS, _COST = "document_lengths", "cost"
_READ_AT_ONCE = 16_384


class TokenBudgetSampler(BalancedBatchSampler, BatchRebalanceSampler):
    """`BalancedBatchSampler` as Trainer knows samplers of batches: by this base class it tells that it must hand one
    to the loader as it is, and that accelerate must not share its batches out a second time. Nothing else of it is
    used."""


def check_budget(arguments: Any, dataset: Any) -> None:
    """Refuse a training set that no budget can be planned for.

    Raises:
        UnsupportedError: a stream.
    """
    if arguments.token_budget is not None and dataset is not None and not has_length(dataset):
        raise UnsupportedError(
            f"`token_budget` ({arguments.token_budget}) needs the lengths of all samples before training, and "
            f"`train_dataset` ({type(dataset).__name__}) is a stream: leave `token_budget` out and pack the stream "
            "with pack_dataset(dataset, max_tokens)."
        )


def _tokens_of(sample: Any, index: int) -> int:
    try:
        return len(sample["input_ids"])
    except (KeyError, IndexError, TypeError) as error:
        found = f"only {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
        raise UnsupportedError(
            f"The tokens of a sample are counted in its `input_ids`, and sample {index} has none ({found}): tokenise "
            "the rows before, or give a `datasets.Dataset` with a column of lengths (`length_column_name`)."
        ) from error


def sample_sizes(dataset: Any, length_column: str) -> tuple[np.ndarray, Any]:
    """Tokens of each sample, int64 [n], and what `attention_cost` takes: the same, or lengths of documents.

    Read from `length_column`, from the rows of `pack_dataset`, or from `input_ids`, one pass over all rows.

    Raises:
        UnsupportedError: a sample without `input_ids`, which has no length yet.
    """
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else ()
    if _DOCUMENT_LENGTHS in columns:
        documents = [np.asarray(lengths) for lengths in dataset.with_format(None)[_DOCUMENT_LENGTHS][:]]
        return np.array([lengths.sum() for lengths in documents]), documents
    if length_column in columns:
        lengths = np.asarray(dataset.with_format(None)[length_column][:])
    elif "input_ids" in columns:
        tables: Any = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_READ_AT_ONCE)
        lengths = np.concatenate([pc.call_function("list_value_length", [table["input_ids"]]) for table in tables])
    else:
        lengths = np.array([_tokens_of(dataset[index], index) for index in range(len(dataset))])
    return lengths, lengths


def budget_sampler(arguments: Any, dataset: Any, state: ParallelState, hidden_size: int) -> TokenBudgetSampler:
    """The batches of this data rank.

    Raises:
        ValueError: a sample that exceeds the budget, or an empty one.
    """
    lengths, documents = sample_sizes(dataset, arguments.length_column_name)
    if (lengths > arguments.token_budget).any():
        index = int((lengths > arguments.token_budget).argmax())
        raise ValueError(
            f"`token_budget` ({arguments.token_budget}) must hold every sample, and sample {index} has "
            f"{lengths[index]} tokens: raise it, or split documents."
        )
    counted = isinstance(dataset, datasets.Dataset) and _COST in dataset.column_names  # images and audio included
    return TokenBudgetSampler(
        np.asarray(dataset.with_format(None)[_COST][:]) if counted else attention_cost(documents, hidden_size),
        arguments.token_budget,
        num_ranks=state.dp_size,
        rank=state.dp_rank,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        lengths=lengths,
        shuffle=arguments.train_sampling_strategy == "random",
        drop_last=arguments.dataloader_drop_last,
    )
