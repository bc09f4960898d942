"""A `compute_loss` of one's own sees what one process would show it: full rows, one batch, one process.

The right value is that of the same class on the stock Trainer in one process; `loss_is_scaled_for_ga` tells that one
what kind of loss it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.ranks.training import VOCABULARY, Outcome, Run, outcome

PLANS = [(1, ""), (2, "dp_shard=2"), (2, "sp=2"), (4, "sp=2,dp_shard=2")]
plans = pytest.mark.parametrize(("world", "plan"), PLANS, ids=[plan or "one process" for _, plan in PLANS])


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits[:, :-1].float().reshape(-1, VOCABULARY)
    return F.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


class _LastToken:
    """Reads one token of the row, and takes no count."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits[:, -1].float().square().mean()
        return (loss, outputs) if return_outputs else loss


class _OwnLabels:
    """Labels of its own beside the logits; divides by the number of items."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = _summed(outputs["logits"], labels) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class _Stack:
    """Calls the backbone and the head itself."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        base = getattr(model, "get_base_model", lambda: model)()
        hidden = base.model(**inputs).last_hidden_state
        logits = base.lm_head(hidden)
        items = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = _summed(logits, labels) / items + 0 * hidden[:, -1].sum()
        return (loss, {"logits": logits}) if return_outputs else loss


class _EveryProcess:
    """As Trainer's own: what is divided by the items of all processes counts for as many, since DDP averages."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits, *_ = outputs = model(**inputs, return_dict=False)
        loss = _summed(logits, labels) / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined]
        return (loss, {"logits": logits, "rest": outputs}) if return_outputs else loss


class _Added:
    """The model's loss, which counts items, and a mean over the batch, which does not."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        hidden = outputs.logits.float().logsumexp(-1).square().mean()
        return (loss + 0.1 * hidden, outputs) if return_outputs else loss + 0.1 * hidden


class _AddedInOneProcess(_Added):
    """The same for the stock Trainer, which adds up what it gets for the batches of a step."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super(_Added, self).compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        steps = self.current_gradient_accumulation_steps if model.training else 1  # type: ignore[attr-defined]
        loss = loss + 0.1 * outputs.logits.float().logsumexp(-1).square().mean() / steps
        return (loss, outputs) if return_outputs else loss


KINDS: dict[str, tuple[type, type, bool | None]] = {  # ours, that of the stock trainer, and what it is told
    "last_token": (_LastToken, _LastToken, False),
    "own_labels": (_OwnLabels, _OwnLabels, None),
    "stack": (_Stack, _Stack, None),
    "every_process": (_EveryProcess, _EveryProcess, None),
    "added": (_Added, _AddedInOneProcess, True),
}


def _run(lora: bool = False, **more: Any) -> Run:
    arguments = {"num_train_epochs": 1, "per_device_eval_batch_size": 1, "eval_strategy": "epoch"} | more
    return Run(lora=lora, plain=True, num_rows=7, eval_rows=3, arguments=arguments)


def _stock(kind: str, run: Run, ranks: int) -> Outcome:
    _, override, scaled = KINDS[kind]
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= ranks
    owner = type("Stock", (override, Trainer), {"loss_is_scaled_for_ga": scaled})
    trainer = owner(model=run.model(), args=TrainingArguments(**arguments), **run.data())
    return outcome(trainer, trainer.train().training_loss)


def _omni(plan: str, kind: str, run: Run, where: str) -> Outcome:
    from hf_veomni import prepare_omni
    from hf_veomni.trainer import OmniTrainer, OmniTrainerMixin, OmniTrainingArguments

    override = KINDS[kind][0]
    model = prepare_omni(run.model(), plan, attention="keep") if where == "keep" else run.model()
    if where != "behind":
        owner = type("Mine", (override, OmniTrainer), {"__module__": __name__})
    else:
        behind = type("Behind", (override, Trainer), {"__module__": __name__})
        owner = type("Mine", (OmniTrainerMixin, behind), {"__module__": __name__})
    trainer = owner(model=model, args=OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data())
    return outcome(trainer, trainer.train().training_loss)


def _on(ranks: Any, world: int, function: Any, *args: Any) -> list[Any]:
    return [function(*args)] if world == 1 else ranks(world).run(function, *args, timeout=120)


def _assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=2e-5)
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).abs().max() < 1e-5, name


@plans
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_overridden_loss_equals_one_process(ranks, world, plan, kind):
    run = _run()
    expected = _stock(kind, run, 2 if "dp_shard" in plan else 1)
    for found in _on(ranks, world, _omni, plan, kind, run, "before"):
        _assert_same(found, expected)
        assert len(found.evaluations) == len(expected.evaluations) == 1


@pytest.mark.parametrize("kind", ["last_token", "added"])
def test_a_trainer_of_ones_own_behind_the_mixin_equals_one_process(ranks, kind):
    run = _run()
    expected = _stock(kind, run, 2)
    for found in ranks(4).run(_omni, "sp=2,dp_shard=2", kind, run, "behind", timeout=120):
        _assert_same(found, expected)


def test_an_overridden_loss_with_adapters_equals_one_process(ranks):
    run = _run(lora=True)
    expected = _stock("last_token", run, 1)
    for found in ranks(2).run(_omni, "sp=2", "last_token", run, "before", timeout=120):
        _assert_same(found, expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_evaluation_with_an_overridden_loss_equals_one_process(ranks, kind):
    """All rows in one batch, padded: some of these losses read what the model's own attention has at padding."""
    run = Run(plain=True, num_rows=2, eval_rows=3, arguments=_run(per_device_eval_batch_size=3).arguments)
    expected = _stock(kind, run, 1).evaluations[0]["eval_loss"]
    for found in ranks(2).run(_omni, "sp=2", kind, run, "keep", timeout=120):
        assert found.evaluations[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def _own_steps(base: type) -> type:
    class Mine(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            with torch.no_grad():
                self.seen.append(float(model(input_ids=inputs["input_ids"]).logits[:, -1].sum()))
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                logits = model(input_ids=inputs["input_ids"]).logits
            return logits[:, -1].square().mean(), None, None

    Mine.__module__ = __name__
    Mine.seen = []  # type: ignore[attr-defined]
    return Mine


def _steps(plan: str | None) -> tuple[float, float, list[float]]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = _run(eval_strategy="no")
    kind = _own_steps(Trainer if plan is None else OmniTrainer)
    arguments: Any = TrainingArguments(**run.all_arguments())
    if plan is not None:
        arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    trainer = kind(model=run.model(), args=arguments, **run.data())
    evaluated = trainer.evaluate()["eval_loss"]
    return evaluated, trainer.train().training_loss, trainer.seen


def test_steps_of_ones_own_see_whole_rows(ranks):
    expected = _steps(None)
    for found in ranks(2).run(_steps, "sp=2", timeout=120):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert found[2] == pytest.approx(expected[2], rel=1e-4)
