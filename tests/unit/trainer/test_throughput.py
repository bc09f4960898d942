"""Tokens a second and MFU in the log of a run in one process: figures by hand, and a clock that evaluation stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_veomni.flops import StepFlops
from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments, throughput
from tests.models import build_model
from tests.ranks.training import Run

ROWS = 8


def _trainer(tmp_path: Path, model: Any = None, **arguments: Any) -> OmniTrainer:
    more = {"log_throughput": True, "logging_steps": 1, "num_train_epochs": 1, "output_dir": str(tmp_path)}
    run = Run(num_rows=ROWS, arguments=more | arguments)
    return OmniTrainer(model=model or run.model(), args=OmniTrainingArguments(**run.all_arguments()), **run.data())


def _logs(trainer: OmniTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_figures_are_those_of_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "device_peak", lambda device: 1e9)
    trainer = _trainer(tmp_path)
    callback = trainer._throughput
    assert callback is not None
    callback.clock = lambda: 2.0 * trainer.state.global_step  # a step takes two seconds
    flops = StepFlops.from_model(trainer.model)
    counted = [[float(x) for x in flops.of_batch(batch)] for batch in trainer.get_train_dataloader()]
    trainer.train()
    logs = _logs(trainer)
    accumulated = trainer.args.gradient_accumulation_steps
    tokens = [sum(t for t, _ in counted[i : i + accumulated]) for i in range(0, len(counted), accumulated)]
    assert len(logs) == len(tokens) > 1
    assert sum(log["tokens_per_second"] for log in logs) == pytest.approx(sum(tokens) / 2)
    assert sum(log["mfu"] for log in logs) == pytest.approx(sum(f for _, f in counted) / 2 / 1e9)
    assert all(log["tokens_per_second_per_device"] == log["tokens_per_second"] for log in logs)


def test_evaluation_and_saving_stop_the_clock(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    callback = trainer._throughput
    assert callback is not None
    now = 0.0
    callback.clock = lambda: now
    callback.on_train_begin(None, None, None)
    callback.add({"input_ids": torch.ones(1, 30)})
    now = 10.0
    callback.on_step_end(None, None, None)
    now = 100.0
    callback.on_evaluate(None, None, None)
    now = 150.0
    callback.on_save(None, None, None)
    now = 155.0
    assert callback.take()["tokens_per_second"] == pytest.approx(30 / 15)


def test_no_mfu_rather_than_a_wrong_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = _trainer(tmp_path / "cpu")
        trainer.train()
    assert all("mfu" not in log and log["tokens_per_second"] > 0 for log in _logs(trainer))
    assert "the peak of this device (cpu) is not known" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = _trainer(tmp_path / "hybrid", build_model("qwen3_next"))
        trainer.train()
    assert all("mfu" not in log and log["tokens_per_second"] > 0 for log in _logs(trainer))
    assert "conv1d.weight" in caplog.text


def test_nothing_is_logged_that_was_not_asked_for(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, log_throughput=False)
    trainer.train()
    assert not {"tokens_per_second", "mfu"} & set().union(*map(set, trainer.state.log_history))
