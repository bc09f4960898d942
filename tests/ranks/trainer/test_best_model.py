"""Early stopping and the best checkpoint: where all rows are one batch, those of the stock trainer in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from tests.ranks.training import Outcome, Run, outcome


def _run(folder: Path) -> Run:
    """The loss on other rows falls, then rises: the learning rate is far too large for what is to come."""
    each = {f"{kind}_strategy": "steps" for kind in ("eval", "save")} | {
        f"{kind}_steps": 1 for kind in ("eval", "save")
    }
    arguments: dict[str, Any] = each | {
        "output_dir": str(folder),
        "num_train_epochs": 6,
        "learning_rate": 1e-2,
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": 8,
        "max_grad_norm": 10.0,
    }
    return Run(plain=True, num_rows=8, eval_rows=5, arguments=arguments)


def _finish(trainer: Any) -> tuple[Outcome, dict[str, Any]]:
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    found = outcome(trainer, trainer.train().training_loss)
    state = trainer.state
    return found, {
        "best": Path(state.best_model_checkpoint).name,
        "metric": state.best_metric,
        "step": state.global_step,
        "evaluated": [entry["eval_loss"] for entry in found.evaluations],
    }


def _omni(plan: str, folder: Path) -> tuple[Outcome, dict[str, Any]]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = _run(folder)
    return _finish(OmniTrainer(run.model(), OmniTrainingArguments(**run.all_arguments(plan=plan)), **run.data()))


@pytest.mark.parametrize("plan", ["sp=2", "dp_shard=2", "pp=2"])
def test_the_best_checkpoint_is_that_of_one_process(ranks, tmp_path, plan):
    run = _run(tmp_path / "stock")
    arguments = run.all_arguments()
    arguments["gradient_accumulation_steps"] *= 2 if "dp" in plan else 1
    expected, best = _finish(Trainer(run.model(), TrainingArguments(**arguments), **run.data()))
    assert best["step"] < expected.state["max_steps"]  # it was stopped
    seen: set[str] = set()
    for found, own in ranks(2).run(_omni, plan, tmp_path / "omni", timeout=120):
        assert (own["best"], own["step"]) == (best["best"], best["step"])
        assert [own["metric"], *own["evaluated"]] == pytest.approx([best["metric"], *best["evaluated"]], rel=1e-5)
        for name, weight in found.weights.items():  # a stage's
            assert (weight - expected.weights[name]).abs().max() < 2e-5, name
        seen |= found.weights.keys()
    assert seen == expected.weights.keys()
