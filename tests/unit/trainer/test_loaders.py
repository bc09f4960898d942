"""Which rows each data rank reads."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_veomni.sequence.randomness import own_stream
from hf_veomni.trainer.loaders import (
    DummyBatch,
    EpochSeeded,
    InOrder,
    UnsplitBatches,
    UnsplitStream,
    keep_batches_unsplit,
    set_epoch,
)


def _shards(rows: int, size: int, ranks: int, drop_last: bool = False) -> list[UnsplitBatches]:
    sampler = BatchSampler(SequentialSampler(range(rows)), size, drop_last)
    return [UnsplitBatches(sampler, ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", range(0, 14))
def test_ranks_together_read_what_one_process_reads(rows, size, ranks, drop_last):
    expected = list(BatchSampler(SequentialSampler(range(rows)), size, drop_last))
    shards = _shards(rows, size, ranks, drop_last)
    read = [list(shard) for shard in shards]
    assert [len(batches) for batches in read] == [len(shard) for shard in shards]
    assert len({len(batches) for batches in read}) == 1, "every rank runs as often"
    real = [batches[: len(batches) - shard.ends_with_dummy] for batches, shard in zip(read, shards, strict=True)]
    in_turn = [real[rank][turn] for turn in range(len(read[0])) for rank in range(ranks) if turn < len(real[rank])]
    assert in_turn == (expected[: len(expected) // ranks * ranks] if drop_last else expected)


def test_only_accelerates_own_sharding_is_replaced():
    sampler = BatchSampler(SequentialSampler(range(8)), 2, False)
    loader = DataLoader(range(8), batch_sampler=BatchSamplerShard(sampler, 2, 0))
    assert isinstance(keep_batches_unsplit(loader), UnsplitBatches)
    assert keep_batches_unsplit(DataLoader(range(8), batch_size=2)) is None
    assert keep_batches_unsplit(DataLoader(range(8), batch_sampler=BatchSamplerShard(sampler, 1, 0))) is None


def test_order_follows_from_seed_and_epoch_alone():
    lengths = [(7 * i) % 23 for i in range(64)]

    def order(epoch: int, seed: int = 0) -> list[int]:
        torch.rand(1)
        sampler = EpochSeeded(LengthGroupedSampler(4, lengths=lengths), seed)
        loader = DataLoader(range(64), batch_sampler=BatchSamplerShard(BatchSampler(sampler, 2, False), 2, 0))
        set_epoch(loader, epoch)
        return list(sampler)

    assert order(0) == order(0) and order(1) == order(1)
    assert order(0) != order(1) and order(0) != order(0, seed=5)
    assert sorted(order(3)) == list(range(64))


def test_a_filler_is_the_batch_marked():
    batch = {"input_ids": torch.arange(4)[None], "labels": torch.arange(4)[None], "note": "kept"}
    padding = DummyBatch.of(batch)
    assert padding == batch and isinstance(padding, DummyBatch) and not isinstance(batch, DummyBatch)


class _Stream(IterableDataset):
    def __init__(self, rows: int):
        self.rows = rows

    def __iter__(self):
        return iter(range(self.rows))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", range(0, 14))
def test_ranks_together_read_each_row_of_a_stream_once(rows, drop_last):
    size, ranks = 2, 3
    read = []
    for rank in range(ranks):
        loader = DataLoader(
            IterableDatasetShard(InOrder(_Stream(rows)), size, drop_last, ranks, rank),
            batch_size=size,
            collate_fn=list,
            drop_last=drop_last,
        )
        assert keep_batches_unsplit(loader) is None and type(loader.dataset) is UnsplitStream
        read.append(list(loader))
    expected = list(BatchSampler(SequentialSampler(range(rows)), size, drop_last))
    in_turn = [read[rank][turn] for turn in range(len(read[0])) for rank in range(ranks) if turn < len(read[rank])]
    assert in_turn == (expected[: len(expected) // ranks * ranks] if drop_last else expected)
    assert len(read[0]) - len(read[-1]) <= 1


def test_own_stream_follows_from_its_key_and_leaves_the_process_stream():
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with own_stream(cpu, 1, 2):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.initial_seed() == 0
    with own_stream(cpu, 1, 2):
        assert torch.equal(torch.rand(3), first)
    with own_stream(cpu, 1, 3):
        assert not torch.equal(torch.rand(3), first)
