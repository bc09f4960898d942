"""Streams assigned by accelerate, optimizers without state or with modes, and the loss that `train` returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments

from tests.ranks.training import Run, assert_same_training, collate, outcome, relative, train_omni, train_stock


class Counted(IterableDataset):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(torch.arange(self.rows))


def _dealt(plan: str, rows: int) -> tuple[list[list[int]], list[int]]:
    """What this rank reads of a stream, and what `gather_for_metrics` makes of it."""
    from accelerate import Accelerator

    from hf_veomni import OmniParallelismConfig

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    loader: Any = accelerator.prepare(DataLoader(Counted(rows), batch_size=2))
    read: list[list[int]] = []
    gathered: list[int] = []
    for batch in loader:
        read.append(batch.tolist())
        gathered += accelerator.gather_for_metrics(batch).tolist()
    return read, gathered


@pytest.mark.parametrize(("plan", "size"), [("sp=2", 2), ("dp_shard=2", 2), ("sp=2,dp_shard=2", 4)])
@pytest.mark.parametrize("rows", [5, 8])
def test_ranks_of_a_group_read_the_same_rows_of_a_stream(ranks, plan, size, rows):
    found = ranks(size).run(_dealt, plan, rows, timeout=60)
    for _, gathered in found:
        assert gathered == list(range(rows))
    if "sp=2" in plan:
        assert all(found[rank][0] == found[rank + 1][0] for rank in range(0, size, 2))


class Modal(torch.optim.SGD):
    """As the schedule-free optimizers: momentum, a step in training mode alone, and modes that look each state up."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["train_mode"] = False

    def train(self) -> None:
        self._enter(True)

    def eval(self) -> None:
        self._enter(False)

    def _enter(self, mode: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                assert "unknown" not in self.state[p]  # a look that leaves an empty entry behind
            group["train_mode"] = mode

    def step(self, closure: Any = None) -> Any:
        assert all(group["train_mode"] for group in self.param_groups), "not in train mode"
        return super().step(closure)


def _resumed(plan: str, optimizer: dict[str, Any], folder: str) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run()
    values = run.all_arguments(output_dir=folder, save_strategy="steps", save_steps=3, optim="sgd")
    for start in (None, f"{folder}/checkpoint-3"):
        arguments = OmniTrainingArguments(**values, plan=plan)
        trainer = OmniTrainer(model=run.model(), args=arguments, **run.data(), **optimizer)
        trainer.train(resume_from_checkpoint=start)
    return outcome(trainer, 0.0)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
        {"optimizer_cls_and_kwargs": (Modal, {"lr": 0.1, "momentum": 0.9})},
    ],
    ids=["no state", "momentum", "modes"],
)
def test_resumes_whatever_the_optimizer_keeps(ranks, tmp_path, optimizer):
    run = Run()
    trainer = Trainer(
        model=run.model(), args=TrainingArguments(**run.all_arguments(optim="sgd")), **run.data(), **optimizer
    )
    trainer.train()
    expected = outcome(trainer, 0.0)
    for found in ranks(2).run(_resumed, "sp=2", optimizer, str(tmp_path), timeout=90):
        assert_same_training(found, expected)


@pytest.mark.parametrize("plan", ["dp_shard=2", "sp=2"])
def test_the_loss_of_a_run_without_logs(ranks, plan):
    run = Run(num_rows=10, arguments={"logging_strategy": "no", "max_steps": 2})
    expected = train_stock(run, data_ranks=2 if plan == "dp_shard=2" else 1)
    for found in ranks(2).run(train_omni, plan, run, timeout=90):
        assert relative([found.train_loss], [expected.train_loss]) < 1e-5


def _streams(plan: str, folder: str, start: str | None) -> list[list[int]]:
    """Tokens of the rows that this rank trains on, one a step, of a stream in four shards."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    fed: list[list[int]] = []

    class Noting(OmniTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            fed.append(inputs["input_ids"].flatten().tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    sizes = {"gradient_accumulation_steps": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments = OmniTrainingArguments(**Run().all_arguments(output_dir=folder, plan=plan, **sizes))
    stream = Dataset.from_list(list(Run().dataset(16, 0))).to_iterable_dataset(num_shards=4)  # type: ignore[arg-type]
    Noting(model=Run().model(), args=arguments, train_dataset=stream, data_collator=collate).train(start)
    return fed


def test_shards_of_a_stream_go_on_on_as_many_data_ranks_and_no_others(ranks, tmp_path):
    """accelerate gives each data rank shards of its own; on another number of them it is unknown what is left."""
    whole = ranks(2).run(_streams, "dp_shard=2", str(tmp_path), None, timeout=60)
    rows = [row["input_ids"] for row in Run().dataset(16, 0)]  # type: ignore[attr-defined]
    first, second = ({rows.index(row) // 4 for row in fed} for fed in whole)
    assert not first & second, "ranks share a shard: the case shows nothing"
    resumed = ranks(2).run(_streams, "dp_shard=2", str(tmp_path), f"{tmp_path}/checkpoint-2", timeout=60)
    assert resumed == [fed[2:] for fed in whole]
    match = "another order of its rows: data ranks was 2 and is 'any' now"
    ranks(2).raises(_streams, "sp=2", str(tmp_path), f"{tmp_path}/checkpoint-2", match=match, timeout=60)
