"""`token_budget`: what it refuses, and where the lengths come from."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from hf_veomni import pack_dataset
from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments
from hf_veomni.trainer.loaders import sample_sizes
from tests.ranks.training import PackedRows, Run, collate, tiny_model

LENGTHS = [3, 7, 5, 2]
SAMPLES = Dataset.from_list([{"input_ids": [1] * length, "length": 10 * length} for length in LENGTHS])


def _arguments(tmp_path, **values):
    return OmniTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_budget": 0}, r"`token_budget` \(0\) must be a positive number"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy` .* with `token_budget`",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "`train_sampling_strategy`"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` .4. .*leave it out"),
    ],
)
def test_what_a_budget_does_not_go_with_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        _arguments(tmp_path, **{"token_budget": 64, **values})


def test_a_stream_is_refused(tmp_path):
    stream = SAMPLES.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`token_budget` \(64\) needs the lengths .* is a stream: leave"):
        OmniTrainer(model=tiny_model(), args=_arguments(tmp_path, token_budget=64), train_dataset=stream)


def test_a_sample_over_the_budget_is_refused(tmp_path):
    trainer = OmniTrainer(
        model=tiny_model(),
        args=_arguments(tmp_path, token_budget=8),
        train_dataset=PackedRows(9),
        data_collator=collate,
    )
    with pytest.raises(
        ValueError, match=r"`token_budget` \(8\) must hold every sample, and sample \d+ has \d+ tokens: raise it"
    ):
        trainer.train()


def test_lengths_come_from_where_they_are_least_expensive():
    packed = pack_dataset(SAMPLES.select_columns(["input_ids"]), max_tokens=10)
    lengths, documents = sample_sizes(packed, "length")
    assert lengths.tolist() == [sum(row) for row in packed["document_lengths"]]
    assert [row.tolist() for row in documents] == list(packed["document_lengths"])
    assert sample_sizes(SAMPLES, "length")[0].tolist() == [10 * length for length in LENGTHS]
    assert sample_sizes(SAMPLES, "another")[0].tolist() == LENGTHS
    assert sample_sizes(SAMPLES.with_format("torch"), "length")[0].tolist() == [10 * length for length in LENGTHS]
    rows = PackedRows(4)
    assert sample_sizes(rows, "length")[0].tolist() == [len(rows[index]["input_ids"]) for index in range(4)]


def test_it_trains_on_every_row_once_an_epoch_in_one_process():
    run = Run(num_rows=9, arguments={"token_budget": 48, "num_train_epochs": 1, "gradient_accumulation_steps": 1})
    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments()), **run.data())
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    rows = run.dataset(9, 0)
    assert sum(len(batch) for batch in batches) == 9
    assert sorted(np.concatenate([batch.sum(1) for batch in batches])) == sorted(
        sum(rows[index]["input_ids"]) for index in range(9)
    )
    trainer.train()
    assert trainer.state.global_step == len(batches) > 1
    assert trainer.get_total_train_batch_size(trainer.args) == round(9 / len(batches))
