"""Tokens and FLOPs of all ranks are those of one process, whatever shares the rows and shards the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.expert.test_expert_load import BiasRun

ROWS = 8
ARGUMENTS = {"log_throughput": True, "logging_steps": 1, "num_train_epochs": 1, "learning_rate": 0.0}


def _train(plan: str, run: BiasRun, directory: Path) -> tuple[float, float]:
    """Tokens, and FLOPs over a peak of 1e9 for each rank, of an epoch of steps of one second."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments, throughput

    original: Any = throughput.device_peak
    throughput.device_peak = lambda device: 1e9  # type: ignore[assignment]
    try:
        arguments = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(directory)))
        trainer = OmniTrainer(model=run.model(), args=arguments, **run.data())
    finally:
        throughput.device_peak = original
    callback = trainer._throughput
    assert callback is not None
    callback.clock = lambda: float(trainer.state.global_step)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(log["tokens_per_second"] == log["tokens_per_second_per_device"] * arguments.world_size for log in logs)
    return sum(log["tokens_per_second"] for log in logs), sum(log["mfu"] for log in logs) * arguments.world_size


@pytest.mark.parametrize("plan", ["sp=2,ep=2", "dp_shard=2,ep=2"])
def test_figures_equal_one_process(ranks, tmp_path, plan):
    run = BiasRun(num_rows=ROWS, arguments=ARGUMENTS)
    tokens, share = _train("", run, tmp_path / "one")
    found = ranks(2).run(_train, plan, run, tmp_path / "ranks", timeout=120)
    assert found[0] == found[1]
    assert found[0] == (pytest.approx(tokens), pytest.approx(share))
