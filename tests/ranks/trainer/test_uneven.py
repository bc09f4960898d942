"""Rows that ranks cannot share out evenly, and batches that fail on one of them: right numbers, and never a hang."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from tests.ranks.training import PackedRows, Run, collate, loss_of_all_targets, outcome

BOTH = [("sp=2,dp_shard=2", 4), ("dp_shard=2", 2)]


def _rows(num_rows: int) -> list[dict[str, Any]]:
    return [dict(row) for row in (Run(plain=True).dataset(num_rows, 5)[i] for i in range(num_rows))]


def _stream(num_rows: int, shards: int) -> IterableDataset:
    return Dataset.from_list(_rows(num_rows)).to_iterable_dataset(num_shards=shards)


def _trainer(plan: str, arguments: dict[str, Any], **options: Any) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(plain=True, arguments=arguments)
    model = options.pop("model", None) or run.model()
    return OmniTrainer(
        model=model, args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **(run.data() | options)
    )


def _counts(prediction: Any) -> dict[str, float]:
    labels = np.asarray(prediction.label_ids)
    weights = np.arange(1, len(labels) + 1)
    return {"rows": float(len(labels)), "order": float((np.where(labels < 0, 0, labels).sum(1) * weights).sum())}


def _evaluate_stream(plan: str, rows: int, shards: int, size: int) -> dict[str, float]:
    trainer = _trainer(plan, {"per_device_eval_batch_size": size}, compute_metrics=_counts)
    metrics = trainer.evaluate(_stream(rows, shards))
    return metrics | {"samples": metrics["eval_samples_per_second"] * metrics["eval_runtime"]}


@pytest.mark.parametrize(("rows", "shards", "size"), [(5, 2, 1), (7, 1, 2), (9, 4, 2), (4, 2, 2)])
@pytest.mark.parametrize(("plan", "world"), BOTH)
def test_a_stream_is_evaluated_row_by_row_in_its_order(ranks, plan, world, rows, shards, size):
    run = Run(plain=True, arguments={"per_device_eval_batch_size": size})
    stock = Trainer(
        model=run.model(),
        args=TrainingArguments(**run.all_arguments()),
        data_collator=collate,
        compute_metrics=_counts,
    )
    expected = stock.evaluate(_stream(rows, shards))
    expected["eval_loss"] = loss_of_all_targets(stock, _rows(rows))
    for found in ranks(world).run(_evaluate_stream, plan, rows, shards, size, timeout=60):
        assert found["eval_rows"] == expected["eval_rows"] == rows
        assert found["eval_order"] == expected["eval_order"]
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert found["samples"] == pytest.approx(rows, rel=0.02)


def _evaluate_too_little(plan: str) -> None:
    _trainer(plan, {}).evaluate(_stream(1, 1))


def test_a_stream_that_leaves_a_data_rank_without_a_batch_is_refused(ranks):
    ranks(2).raises(_evaluate_too_little, "dp_shard=2", match="Data rank 1 got no batch", timeout=60)


def _steps_a_second(plan: str) -> list[float]:
    trainer = _trainer(plan, {"per_device_eval_batch_size": 1}, eval_dataset=_rows(9))
    found = [trainer.evaluate(), trainer.predict(_rows(9)).metrics]
    return [m[f"{n}_steps_per_second"] * m[f"{n}_runtime"] for n, m in zip(("eval", "test"), found, strict=True)]


@pytest.mark.parametrize(("plan", "world"), [*BOTH, ("sp=2", 2)])
def test_evaluation_steps_are_those_of_a_data_rank(ranks, plan, world):
    data_ranks = 1 if plan == "sp=2" else 2
    for steps in ranks(world).run(_steps_a_second, plan, timeout=60):
        assert steps == pytest.approx([math.ceil(9 / data_ranks)] * 2, rel=0.02)


class _BadRow(PackedRows):
    """The row with this number cannot be read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            raise ValueError("row 5 is broken")
        return super().__getitem__(index)


def _broken(plan: str, evaluating: bool) -> None:
    arguments = {"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 1}
    trainer = _trainer(plan, arguments, train_dataset=_BadRow(8, 0), eval_dataset=_BadRow(8, 0))
    trainer.evaluate() if evaluating else trainer.train()


@pytest.mark.parametrize("evaluating", [False, True], ids=["training", "evaluation"])
def test_a_row_that_one_data_rank_cannot_read_stops_all(ranks, evaluating):
    messages = ranks(4).raises(_broken, "sp=2,dp_shard=2", evaluating, match="row 5 is broken", timeout=30)
    assert "Reading a batch failed on ranks 2, 3: " in messages[0]  # an SP group reads the same rows


def _own_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    """No label in it: blank ones would not stop a dummy batch from counting."""
    return model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits.float().square().mean()


def _with_plain_mean(trainer: Any) -> Any:
    """A model that takes no number of tokens, or a loss of one's own: the mean over micro-batches counts."""
    trainer.model_accepts_loss_kwargs = False
    return outcome(trainer, trainer.train().training_loss)


def _plain_mean(plan: str, kind: str) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    kinds = {"own": type("Mine", (OmniTrainer,), {"compute_loss": _own_loss}), "model": OmniTrainer}
    run = Run()
    trainer = kinds[kind](model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    return _with_plain_mean(trainer)


@pytest.mark.parametrize("kind", ["own", "model"])
def test_a_mean_over_batches_counts_each_once(ranks, kind):
    """9 rows over 2 x 2: a data rank without a last row."""
    run = Run()
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= 2
    kinds = {"own": type("Mine", (Trainer,), {"compute_loss": _own_loss}), "model": Trainer}
    stock = kinds[kind](model=run.model(), args=TrainingArguments(**arguments), **run.data())
    expected = _with_plain_mean(stock)
    for found in ranks(2).run(_plain_mean, "dp_shard=2", kind, timeout=60):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-5)
        for name, weight in expected.weights.items():
            assert (found.weights[name] - weight).abs().max() < 1e-5, name
