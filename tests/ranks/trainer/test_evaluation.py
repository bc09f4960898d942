"""Evaluation and prediction on ranks show a user's functions what one process would show them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from tests.ranks.training import Run, collate, full, loss_of_all_targets, tiny_mixtral, train_omni, train_stock

PLANS = [(2, "sp=2"), (2, "dp_shard=2"), (4, "sp=2,dp_shard=2"), (4, "dp_replicate=2,sp=2")]
plans = pytest.mark.parametrize(("world", "plan"), PLANS, ids=[plan for _, plan in PLANS])


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Depends on every logit, on their order, and on how many there are."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    weights = np.arange(1, logits.shape[0] + 1)
    scored = np.where(labels[..., None] == -100, 0, logits)  # padding: see `_assert_close`
    return {
        "rows": float(logits.shape[0]),
        "length": float(logits.shape[1]),
        "weighted": float((scored.mean(axis=(1, 2)) * weights).sum()),
        "labels": float((np.where(labels == -100, 0, labels).sum(axis=1) * weights).sum()),
    }


def _evaluate_with(trainer: Trainer, run: Run) -> dict[str, Any]:
    found = trainer.evaluate()
    predicted = trainer.predict(run.dataset(5, 9))
    kept = {key: value for key, value in found.items() if "per_second" not in key and "time" not in key}
    return {"metrics": kept, "predictions": predicted.predictions, "labels": predicted.label_ids}


def _stock(run: Run, **options: Any) -> dict[str, Any]:
    trainer = Trainer(
        model=run.model(), args=TrainingArguments(**run.all_arguments()), **run.data(), **run.options, **options
    )
    found = _evaluate_with(trainer, run)
    found["metrics"]["eval_loss"] = loss_of_all_targets(trainer, run.dataset(run.eval_rows, 5))
    return found


def _omni(plan: str, run: Run, **options: Any) -> dict[str, Any]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    trainer = OmniTrainer(model=run.model(), args=arguments, **run.data(), **run.options, **options)
    return _evaluate_with(trainer, run)


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["metrics"].keys() == expected["metrics"].keys()
    for key, value in expected["metrics"].items():
        assert found["metrics"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert np.array_equal(found["labels"], expected["labels"])
    assert found["predictions"].shape == expected["predictions"].shape
    _assert_close(found["predictions"], expected["predictions"], expected["labels"] != -100)


def _assert_close(found: np.ndarray, expected: np.ndarray, valid: np.ndarray) -> None:
    """Where there is a token: what an attention puts at padding is its own affair."""
    assert np.abs(found[valid].astype(np.float64) - expected[valid]).max() < 1e-5


@plans
@pytest.mark.parametrize("eval_rows", [11, 2], ids=["last_batch_short", "fewer_batches_than_ranks"])
def test_metrics_and_predictions_equal_one_process(ranks, world, plan, eval_rows):
    run = Run(plain=True, eval_rows=eval_rows, options={"compute_metrics": _metrics})
    expected = _stock(run)
    for found in ranks(world).run(_omni, plan, run, timeout=120):
        _assert_same(found, expected)


def _top_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert logits.shape[:2] == labels.shape, "full rows"
    return logits.argmax(-1)


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (Run(plain=True, eval_rows=7), {"preprocess_logits_for_metrics": _top_token}),
        (Run(eval_rows=5, arguments={"per_device_eval_batch_size": 1}), {}),
        (Run(plain=True, eval_rows=7, arguments={"label_smoothing_factor": 0.2}), {}),
        (Run(plain=True, eval_rows=7, arguments={"eval_accumulation_steps": 1}), {}),
        (Run(plain=True, eval_rows=7, arguments={"include_for_metrics": ["inputs", "loss"]}), {}),
        (Run(plain=True, eval_rows=7, lora=True), {}),
    ],
    ids=["preprocess", "packed", "label_smoothing", "accumulation", "include", "lora"],
)
def test_evaluation_features_equal_one_process(ranks, run, options):
    metrics = _metrics if not options else _count_tokens
    expected = _stock(run, compute_metrics=metrics, **options)
    for found in ranks(4).run(_omni, "sp=2,dp_shard=2", run, compute_metrics=metrics, **options, timeout=120):
        _assert_same(found, expected)


def _count_tokens(prediction: EvalPrediction) -> dict[str, float]:
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    valid = labels != -100
    return {
        "hits": float((predicted == labels)[valid].sum()),
        "total": float(predicted[valid].sum()),
        "rows": float(len(predicted)),
    }


def _batched(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
    _seen.append(int(prediction.predictions.shape[0]))
    return {"rows": float(sum(_seen))} if compute_result else {}


_seen: list[int] = []


def _batch_eval(plan: str, run: Run) -> float:
    _seen.clear()
    return _omni(plan, run, compute_metrics=_batched)["metrics"]["eval_rows"]


def test_batch_eval_metrics_count_each_row_once(ranks):
    run = Run(plain=True, eval_rows=7, arguments={"batch_eval_metrics": True})
    assert ranks(4).run(_batch_eval, "sp=2,dp_shard=2", run, timeout=120) == [7.0] * 4


def _loss_only(plan: str, run: Run) -> tuple[float, int]:
    """The evaluation loss, and how often the full logits were made."""
    from hf_veomni.loss.head import HeadCall
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    made = 0
    stock = HeadCall.run

    def counted(self: HeadCall, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += hidden.shape == self.hidden.shape
        return stock(self, hidden)

    HeadCall.run = counted
    try:
        trainer = OmniTrainer(
            model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data()
        )
        head = trainer.model.get_output_embeddings()
        calls: list[bool] = []
        head.register_forward_hook(lambda module, args, out: calls.append(type(out) is torch.Tensor))
        loss = trainer.evaluate()["eval_loss"]
        return loss, made + sum(calls)
    finally:
        HeadCall.run = stock


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_loss_only_evaluation_makes_no_logits(ranks, arguments):
    run = Run(plain=True, eval_rows=7, arguments=arguments)
    expected = _stock(run)["metrics"]["eval_loss"]
    for loss, made in ranks(2).run(_loss_only, "sp=2", run, timeout=120):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert made == 0


def _while_training(plan: str, run: Run):
    return train_omni(plan, run)


def test_evaluation_between_steps_leaves_training_as_it_is(ranks):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3}
    run = Run(plain=True, num_rows=8, eval_rows=3, arguments=arguments)  # evaluated in one batch
    expected = train_stock(run, 2)
    assert len(expected.evaluations) == 5
    run = replace(run, arguments=arguments | {"per_device_eval_batch_size": 1})
    for found in ranks(4).run(_while_training, "sp=2,dp_shard=2", run, timeout=120):
        losses = [entry["eval_loss"] for entry in found.evaluations]
        assert losses == pytest.approx([entry["eval_loss"] for entry in expected.evaluations], rel=1e-5)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def _without_labels(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run()
    trainer = OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    rows = [{"input_ids": row["input_ids"]} for row in (run.dataset(3, 2)[i] for i in range(3))]
    found = trainer.predict(rows).predictions
    assert full(next(iter(trainer.model.parameters()))).ndim
    return torch.tensor(found)


def test_prediction_without_labels(ranks):
    run = Run()
    trainer = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), data_collator=collate)
    rows = [{"input_ids": row["input_ids"]} for row in (run.dataset(3, 2)[i] for i in range(3))]
    expected = torch.tensor(trainer.predict(rows).predictions)
    for found in ranks(4).run(_without_labels, "sp=2,dp_shard=2", timeout=120):
        assert found.shape == expected.shape
        for row, logits, reference in zip(rows, found, expected, strict=True):
            valid = slice(len(row["input_ids"]))
            assert (logits[valid] - reference[valid]).abs().max() < 1e-5


def _eval_loss(plan: str, run: Run, form: str) -> float:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    options: dict[str, Any] = {"compute_loss_func": _token_loss} if form == "compute_loss_func" else {}
    model = tiny_mixtral() if form == "experts" else run.model()
    return OmniTrainer(model=model, args=arguments, **run.data(), **options).evaluate()["eval_loss"]


def _token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("form", ["model", "compute_loss_func", "experts"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("world", "plan"), [(1, ""), (2, "dp_shard=2"), (4, "sp=2,dp_shard=2")])
def test_the_evaluation_loss_is_the_same_for_every_batch_size_and_plan(ranks, world, plan, size, form):
    run = Run(plain=True, eval_rows=7, arguments={"per_device_eval_batch_size": 7})
    model = tiny_mixtral() if form == "experts" else run.model()
    stock = Trainer(model=model, args=TrainingArguments(**run.all_arguments()), **run.data())
    expected = stock.evaluate()["eval_loss"]  # all rows in one batch
    run = replace(run, arguments={"per_device_eval_batch_size": size})
    losses = [_eval_loss(plan, run, form)] if world == 1 else ranks(world).run(_eval_loss, plan, run, form, timeout=60)
    assert losses == pytest.approx([expected] * world, rel=1e-5)


def _kept(plan: str, run: Run) -> Any:
    from hf_veomni import prepare_omni
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    model = prepare_omni(run.model(), plan, attention="keep")
    trainer = OmniTrainer(model, OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    return trainer.predict(run.dataset(5, 9))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2"])
def test_predictions_at_padding_are_those_of_the_models_own_attention(ranks, plan):
    """And `label_names` of several columns come back as the stock trainer hands them out."""
    run = Run(plain=True, arguments={"label_names": ["labels", "input_ids"]})
    trainer = Trainer(run.model(), TrainingArguments(**run.all_arguments()), **run.data())
    expected: Any = trainer.predict(run.dataset(5, 9))
    assert (expected.label_ids[0] == -100).any()
    for found in ranks(2).run(_kept, plan, run, timeout=60):
        assert all(np.array_equal(*pair) for pair in zip(found.label_ids, expected.label_ids, strict=True))
        assert found.predictions.shape == expected.predictions.shape
        assert np.abs(found.predictions - expected.predictions).max() < 1e-5
