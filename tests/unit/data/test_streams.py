"""Streams are packed buffer by buffer: whatever they hold, wherever they stop."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_veomni.data import pack_dataset


def samples_of(lengths):
    """Documents whose tokens tell which document and which place they come from."""
    return [{"input_ids": list(range(1000 * number, 1000 * number + length))} for number, length in enumerate(lengths)]


def as_stream(samples):
    return IterableDataset.from_generator(lambda: iter(samples))


def test_a_stream_without_a_schema_is_looked_at():
    stream = as_stream([{"text": ""}, {"text": "abc"}, {"text": "de"}]).map(
        lambda s: {"input_ids": list(s["text"].encode())}
    )
    assert stream.features is None
    (row,) = pack_dataset(stream, 8)
    assert bytes(row["input_ids"]) == b"abcde"


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_stream_may_hold_lists_arrays_or_tensors(kind):
    stream = as_stream(
        [{"input_ids": kind([1, 2]), "labels": kind([3, 4])}, {"input_ids": kind([5]), "labels": kind([6])}]
    )
    (row,) = pack_dataset(stream, 8)
    assert row["input_ids"] == [1, 2, 5] and row["labels"] == [-100, 4, -100]


def test_a_sample_of_a_stream_that_differs_in_type_is_named():
    stream = as_stream([{"input_ids": [1, 2]}, {"input_ids": ["a"]}])
    with pytest.raises(ValueError, match="samples 0 to 1: `input_ids` does not hold list<item: int32>"):
        list(pack_dataset(stream, 8))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stream_resumes_where_it_stopped(stop):
    source = Dataset.from_list(samples_of(np.random.default_rng(0).integers(1, 30, 100)))

    def stream():
        return pack_dataset(source.to_iterable_dataset(num_shards=4), 64, buffer_size=10)

    whole = list(stream())
    first = stream()
    begin = [row for _, row in zip(range(stop), first, strict=False)]
    second = stream()
    second.load_state_dict(first.state_dict())
    assert begin + list(second) == whole


def test_a_stream_keeps_its_shards():
    source = Dataset.from_list(samples_of([5] * 40))
    packed = pack_dataset(source.to_iterable_dataset(num_shards=4), 10, buffer_size=8)
    assert packed.num_shards == 4
    parts = [list(packed.shard(num_shards=2, index=index)) for index in range(2)]
    ids = sorted(token for part in parts for row in part for token in row["input_ids"])
    assert ids == sorted(token for sample in source for token in sample["input_ids"])
