import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_veomni.data import OmniDataCollatorWithPacking, pack_dataset, unpack


def values(batch):
    assert all(value.shape[0] == 1 and value.ndim == 2 for value in batch.values())
    return {name: value[0].tolist() for name, value in batch.items()}


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, dtype=np.uint16), torch.tensor])
def test_raw_samples_become_one_row(kind):
    batch = OmniDataCollatorWithPacking()([{"input_ids": kind([1, 2, 3])}, {"input_ids": kind([4])}])
    assert {value.dtype for value in batch.values()} == {torch.long}
    assert values(batch) == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, -100], "position_ids": [0, 1, 2, 0]}


def test_given_labels_are_kept_but_for_the_first_of_each_document():
    samples = [{"input_ids": [1, 2, 3], "labels": [7, -100, 8]}, {"input_ids": [4, 5], "labels": [9, 10]}]
    assert values(OmniDataCollatorWithPacking()(samples))["labels"] == [-100, -100, 8, -100, 10]
    assert samples[0]["labels"] == [7, -100, 8]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_samples_are_not_changed(kind):
    sample = {"input_ids": kind([1, 2, 3]), "labels": kind([1, 2, 3])}
    batch = OmniDataCollatorWithPacking()([sample])
    batch["input_ids"].zero_()
    assert list(sample["input_ids"]) == [1, 2, 3] and list(sample["labels"]) == [1, 2, 3]


def test_one_sample_without_labels_keeps_tokens_and_labels_apart():
    ids = torch.tensor([5, 6])
    batch = OmniDataCollatorWithPacking()([{"input_ids": ids}])
    assert values(batch)["input_ids"] == [5, 6] and values(batch)["labels"] == [-100, 6]
    assert ids.tolist() == [5, 6]


def test_packed_rows_keep_their_documents():
    by_positions = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 0]}
    by_lengths = {"input_ids": [5, 6, 7], "document_lengths": [1, 2]}
    batch = values(OmniDataCollatorWithPacking()([by_positions, by_lengths, {"input_ids": [8, 9]}]))
    assert batch["position_ids"] == [0, 1, 0, 0, 0, 0, 1, 0, 1]
    assert batch["labels"] == [-100, 2, -100, -100, -100, -100, 7, -100, 9]


@pytest.mark.parametrize("removed", [[], ["document_lengths"], ["position_ids"]])
def test_a_packed_dataset_gives_its_rows_as_they_are(removed):
    source = Dataset.from_list([{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 5, 2, 7, 1, 4)])
    packed = pack_dataset(source, 8)
    loader = DataLoader(packed.remove_columns(removed), collate_fn=OmniDataCollatorWithPacking(8))
    for batch, row in zip(loader, packed, strict=True):
        expected = {name: row[name] for name in ("input_ids", "labels", "position_ids")}
        assert values(batch) == expected
        assert [len(document["input_ids"]) for document in unpack(batch)] == row["document_lengths"]


def test_padding_and_empty_samples_are_left_out():
    samples = [
        {"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1], "labels": [-100, 1, 2]},
        {"input_ids": [], "attention_mask": [], "labels": []},
        {"input_ids": [0, 0], "attention_mask": [0, 0], "labels": [-100, -100]},
        {"input_ids": [3, 4, 0], "attention_mask": [1, 1, 0], "labels": [3, 4, -100]},
    ]
    batch = values(OmniDataCollatorWithPacking()(samples))
    assert batch == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "position_ids": [0, 1, 0, 1]}


class Tokenizer:
    pad_token_id = 63


class Processor:
    tokenizer = Tokenizer()


@pytest.mark.parametrize("processor, pad", [(None, 0), (Tokenizer(), 63), (Processor(), 63)])
def test_pad_to_multiple_of_adds_a_document_without_targets(processor, pad):
    collator = OmniDataCollatorWithPacking(8, processor, pad_to_multiple_of=4, columns=["weights"])
    samples = [{"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 1.5]}, {"input_ids": [4, 5], "weights": [1.0, 2.0]}]
    batch = collator(samples)
    assert batch["weights"].dtype == torch.float32
    assert values(batch) == {
        "input_ids": [1, 2, 3, 4, 5, pad, pad, pad],
        "labels": [-100, 2, 3, -100, 5, -100, -100, -100],
        "position_ids": [0, 1, 2, 0, 1, 0, 1, 2],
        "weights": [0.5, 1.0, 1.5, 1.0, 2.0, 0.0, 0.0, 0.0],
    }
    assert values(OmniDataCollatorWithPacking(pad_to_multiple_of=2)([{"input_ids": [1, 2]}]))["input_ids"] == [1, 2]


@pytest.mark.parametrize(
    "samples, message",
    [
        (
            [{"input_ids": [1] * 5}, {"input_ids": [1] * 4}],
            "2 samples have 9 tokens together, more than",
        ),
        (
            [{"input_ids": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            "sample 1 of the batch: `labels` is missing here",
        ),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}],
            "sample 1 of the batch: `labels` is missing here",
        ),
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            "sample 0 of the batch: `labels` has 1 elements",
        ),
        ([{"labels": [1]}], "sample 0 of the batch: `input_ids` is missing"),
        ([{"input_ids": [1], "images": ["a.png"]}], "sample 0 of the batch has raw `images` beside `input_ids`"),
        ([{"text": "a", "images": ["a.png"]}], "sample 0 of the batch has raw `text`: give `processor=`"),
        ([{"input_ids": [1], "text": "a"}], "sample 0 of the batch has a key `text` that cannot be packed"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "`attention_mask` has zeros between ones"),
        ([{"input_ids": [1, 2], "position_ids": [3, 4]}], "`position_ids` must count 0, 1, 2, ... in each document"),
        ([{"input_ids": [1, 2], "position_ids": [0, 2]}], "`position_ids` must count 0, 1, 2, ... in each document"),
        ([{"input_ids": [1, 2], "position_ids": [[0, 1], [0, 1]]}], "`position_ids` have shape [2, 2]"),
        ([{"input_ids": [1, 2], "document_lengths": [1, 2]}], "`document_lengths` sum to 3 and `input_ids` has 2"),
        (
            [{"input_ids": [1, 2], "document_lengths": [1, 1], "position_ids": [0, 1]}],
            "`position_ids` must count 0, 1, 2, ... in each document of `document_lengths`",
        ),
        ([{"input_ids": [[1, 2], [3, 4]]}], "`input_ids` has shape (2, 2)"),
        ([{"input_ids": [0.5]}], "`input_ids` holds float64, and must hold integers"),
        ([{"input_ids": []}], "None of the 1 samples of the batch has a token"),
        ([], "empty list of samples"),
    ],
)
def test_a_bad_batch_is_named(samples, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OmniDataCollatorWithPacking(max_tokens=8)(samples)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "`max_tokens` (0) must be a positive integer or None"),
        ({"pad_to_multiple_of": 2.0}, "`pad_to_multiple_of` (2.0) must be a positive integer or None"),
        ({"max_tokens": 10, "pad_to_multiple_of": 4}, "`pad_to_multiple_of` (4) must divide `max_tokens` (10)"),
    ],
)
def test_a_bad_option_of_the_collator_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OmniDataCollatorWithPacking(**options)
