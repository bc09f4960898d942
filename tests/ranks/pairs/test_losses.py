"""Losses of one's own with two sequences in flight."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks.trainer import test_losses as functions
from tests.ranks.trainer import test_overrides as overridden
from tests.ranks.training import Run

ROWS = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}  # nothing to run beside a batch of two


@pytest.mark.parametrize("kind", ["last_token", "own_labels", "added"])
def test_an_overridden_loss_is_that_of_the_whole_batch(ranks, kind: str) -> None:
    """A mean over a batch is no sum of means over its halves."""
    run = overridden._run(**ROWS)
    expected = overridden._stock(kind, run, 1)
    for found in ranks(2).run(overridden._omni, "sp=2,overlap=pairs", kind, run, "keep", timeout=120):
        overridden._assert_same(found, expected)


def _function(plan: str) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(plain=True, num_rows=7)
    arguments = OmniTrainingArguments(**functions._arguments(plan=plan, **ROWS))
    trainer = OmniTrainer(run.model(), arguments, compute_loss_func=functions._mean, **run.data())
    return functions.outcome(trainer, trainer.train().training_loss)


def test_a_mean_of_a_function_is_that_of_the_whole_batch(ranks) -> None:
    run = Run(plain=True, num_rows=7)
    kind = type("Stock", (functions.Trainer,), {"loss_is_scaled_for_ga": False})
    arguments = functions.TrainingArguments(**functions._arguments(**ROWS))
    stock = kind(run.model(), arguments, compute_loss_func=functions._mean, **run.data())
    expected = functions.outcome(stock, stock.train().training_loss)
    for found in ranks(2).run(_function, "sp=2,overlap=pairs", timeout=120):
        functions._assert_same(found, expected)
