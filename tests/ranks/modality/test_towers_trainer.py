"""OmniTrainer on models of vision and audio: packed sequences under sequence parallelism train as the stock Trainer
does."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from tests.multimodal import build, samples_of
from tests.ranks.training import Outcome, Run, assert_same_training, outcome


class _Samples:
    """Raw samples, which only the collator reads. Twice, so that an epoch has windows with and without items."""

    def __init__(self, family: str) -> None:
        self.samples = samples_of(family) * 2

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def _arguments(**more: Any) -> dict[str, Any]:
    fixed = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "num_train_epochs": 1}
    return Run().all_arguments(include_num_input_tokens_seen="no", **fixed, **more)


def _options(family: str) -> dict[str, Any]:
    from hf_veomni import OmniDataCollatorWithPacking

    model, processor = build(family)
    collator = OmniDataCollatorWithPacking(processor=processor, model_config=model.config)
    return {"model": model, "train_dataset": _Samples(family), "data_collator": collator}


def _train(family: str, plan: str, batch: int, accumulation: int) -> Outcome:
    from hf_veomni import OmniTrainer, OmniTrainingArguments

    arguments = _arguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = OmniTrainer(args=OmniTrainingArguments(**arguments, plan=plan), **_options(family))
    return outcome(trainer, trainer.train().training_loss)


def _train_stock(family: str) -> Outcome:
    """One sample a row; two rows a step."""
    arguments = _arguments(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer = Trainer(args=TrainingArguments(**arguments), **_options(family))
    return outcome(trainer, trainer.train().training_loss)


@pytest.mark.parametrize(("plan", "accumulation"), [("sp=2", 2), ("dp_shard=2", 1)])
def test_training_equals_the_stock_trainer(ranks, plan, accumulation):
    """Two samples a step, one after the other on an SP group or one on each data rank; some have no images."""
    expected = _train_stock("qwen3_vl")
    for found in ranks(2).run(_train, "qwen3_vl", plan, 1, accumulation, timeout=120):
        expected.state["total_flos"] = found.state["total_flos"]  # an estimate: an SP rank counts its part
        assert_same_training(found, expected)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_audio"])
def test_packed_rows_equal_one_process(ranks, family):
    """Two samples in each row."""
    (expected,) = ranks(1).run(_train, family, "sp=1", 2, 2, timeout=120)
    for found in ranks(2).run(_train, family, "sp=2", 2, 2, timeout=120):
        expected.state["total_flos"] = found.state["total_flos"]
        assert_same_training(found, expected)
