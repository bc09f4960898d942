"""OmniTrainer with two sequences in flight trains as the stock Trainer does, and logs what it logs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.ranks.training import Run, assert_same_training, train_omni, train_stock

ALONE = {"gradient_accumulation_steps": 1}


def _train(plan: str, run: Run) -> tuple[Any, Counter[str]]:
    """What training left behind, and how often two sequences ran at once: micro-batches, or parts of one."""
    import hf_veomni.trainer.losses as losses

    ran: Counter[str] = Counter()
    stock = losses.run_pair

    def counting(*args: Any, parts: bool = False) -> Any:
        ran["parts" if parts else "micro-batches"] += 1
        return stock(*args, parts=parts)

    losses.run_pair = counting
    try:
        return train_omni(plan, run), ran
    finally:
        losses.run_pair = stock


@pytest.mark.parametrize(
    ("plan", "run", "ran"),
    [
        # 9 rows: the last window of each of 2 epochs holds one.
        ("sp=2,overlap=pairs", Run(), {"micro-batches": 8, "parts": 2}),
        ("sp=2,overlap=pairs", Run(lora=True), {"micro-batches": 8, "parts": 2}),
        ("dp_shard=2,overlap=pairs", Run(num_rows=8), {"micro-batches": 4}),
        (
            "sp=2,overlap=pairs",
            Run(num_rows=6, arguments={"gradient_accumulation_steps": 3, "activation_checkpointing": True}),
            {"micro-batches": 4, "parts": 4},
        ),
        (
            "sp=2,overlap=pairs",
            Run(
                plain=True, num_rows=8, arguments={"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
            ),
            {"parts": 8},
        ),
    ],
    ids=["sp", "lora", "dp_shard", "three, checkpointing", "padded rows"],
)
def test_training_equals_one_process(ranks, plan: str, run: Run, ran: dict[str, int]) -> None:
    expected = train_stock(run, 1 if "sp=2" in plan else 2)
    for found, times in ranks(2).run(_train, plan, run, timeout=180):
        assert_same_training(found, expected)
        assert times["micro-batches"] == ran.get("micro-batches", 0)
        assert times["parts"] <= ran.get("parts", 0)  # not of a row that holds a single document
        assert bool(times["parts"]) == ("parts" in ran)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("plan", ["sp=2,ep=2", "sp=2"])
def test_router_loss_equals_one_process(ranks, tmp_path, plan: str, accumulation: int) -> None:
    """Of a batch in two parts it is that of the batch, which is not the sum of the parts' losses."""
    from tests.ranks.expert.test_experts_trainer import ExpertRun, _train

    arguments = {"gradient_accumulation_steps": accumulation}
    config = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    run = ExpertRun(config=config, num_rows=8, arguments=arguments)
    expected = _train("", run, tmp_path)
    for found in ranks(2).run(_train, f"{plan},overlap=pairs", run, tmp_path, timeout=180):
        assert_same_training(found, expected)
