"""A batch that only keeps a rank in step counts nowhere: not in the router's loss, nor in the load of the experts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.models import build_model
from tests.ranks.training import VOCABULARY, Outcome, PlainRows, Run, collate, outcome, tiny_mixtral, tiny_model

MODELS = ["mixtral", "qwen3_moe", "olmoe"]


def _model(name: str) -> nn.Module:
    router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    return tiny_mixtral(**router) if name == "mixtral" else build_model(name, **router)


def _rows(num_rows: int) -> Dataset:
    """Rows of equal length, so that one process may take several at once."""
    generator = torch.Generator().manual_seed(4)
    tokens = [torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in range(num_rows)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def _run(**more: Any) -> Run:
    arguments = {"gradient_accumulation_steps": 1, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    return Run(arguments=arguments | more)


def _omni(plan: str, name: str, num_rows: int, **more: Any) -> tuple[Outcome, list[torch.Tensor]]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**_run(**more).all_arguments(plan=plan))
    trainer = OmniTrainer(_model(name), arguments, train_dataset=_rows(num_rows), data_collator=_collate)
    found = outcome(trainer, trainer.train().training_loss)
    load = trainer._expert_load
    return found, [] if load is None else [counted.tokens for _, counted in load.history]


@pytest.mark.parametrize(("world", "plan"), [(2, "dp_shard=2"), (4, "sp=2,dp_shard=2")])
@pytest.mark.parametrize("name", MODELS)
def test_the_router_loss_of_a_filled_up_step_equals_one_process(ranks, name, world, plan):
    """3 rows by 2: in the second step one data rank has no row of its own."""
    arguments = _run(per_device_train_batch_size=2).all_arguments()
    stock = Trainer(_model(name), TrainingArguments(**arguments), train_dataset=_rows(3), data_collator=_collate)
    expected = outcome(stock, stock.train().training_loss)
    for found, _ in ranks(world).run(_omni, plan, name, 3, timeout=90):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=2e-5)


def test_the_router_loss_of_a_filled_up_window_equals_one_process(ranks):
    """5 rows by 2 data ranks and 2 micro-batches of one row each: three of the last four are dummies."""
    found = ranks(2).run(
        _omni, "dp_shard=2", "mixtral", 5, gradient_accumulation_steps=2, learning_rate=0.0, timeout=90
    )
    for omni, _ in found:
        last = _stock_window()
        assert omni.losses[-1] == pytest.approx(last, rel=1e-5)


def _stock_window() -> float:
    """The stock loss of the last row alone; the step before it, at a rate of 0, has changed nothing."""
    arguments = _run(learning_rate=0.0).all_arguments()
    rows = _rows(5).select([4])
    stock = Trainer(_model("mixtral"), TrainingArguments(**arguments), train_dataset=rows, data_collator=_collate)
    return outcome(stock, stock.train().training_loss).losses[0]


@pytest.mark.parametrize("plan", ["dp_shard=2", "dp_shard=2,ep=2"])
def test_the_load_of_experts_counts_each_row_once(ranks, plan):
    """3 rows of 9 tokens over 2 data ranks, 2 experts a token."""
    more = {"log_expert_load": True, "logging_steps": 1}
    for _, counts in ranks(2).run(_omni, plan, "mixtral", 3, timeout=90, **more):
        assert [int(tokens[0].sum()) for tokens in counts] == [2 * 9 * 2, 1 * 9 * 2]


class _OverAllRanks:
    """A loss that is normalised by what accelerate knows of all ranks, put before a trainer."""

    def compute_loss(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        labels = inputs.pop("labels")
        logits, targets = model(**inputs).logits[:, :-1].float(), labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        counted = (targets != -100).sum().float()
        return total / self.accelerator.reduce({"items": [counted]}, "mean")["items"][0]


def _normalised(plan: str) -> Outcome:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    kind: Any = type("Normalised", (_OverAllRanks, OmniTrainer), {})
    arguments = OmniTrainingArguments(**_run().all_arguments(plan=plan))
    trainer = kind(tiny_model(), arguments, train_dataset=PlainRows(3), data_collator=collate)
    return outcome(trainer, trainer.train().training_loss)


@pytest.mark.parametrize(("world", "plan"), [(2, "dp_shard=2"), (4, "sp=2,dp_shard=2")])
def test_reductions_of_a_loss_leave_out_what_fills_a_step_up(ranks, world, plan):
    """3 rows of uneven lengths by 2: a count of all ranks, with the row that is there twice, is another one."""
    kind: Any = type("Normalised", (_OverAllRanks, Trainer), {})
    arguments = TrainingArguments(**_run(per_device_train_batch_size=2).all_arguments())
    stock = kind(tiny_model(), arguments, train_dataset=PlainRows(3), data_collator=collate)
    expected = outcome(stock, stock.train().training_loss)
    for found in ranks(world).run(_normalised, plan, timeout=90):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=2e-5)


def _reduced(everywhere: bool) -> list[float]:
    from accelerate import Accelerator

    from hf_veomni import OmniParallelismConfig
    from hf_veomni.expert import counting_no_tokens

    accelerator = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig("dp_shard=2"))
    rank = accelerator.process_index
    with counting_no_tokens() if rank or everywhere else nullcontext():
        values = [torch.tensor(2 + 3 * rank), torch.tensor(-2.0 + 3 * rank)]
        return [float(accelerator.reduce(v, kind)) for kind in ("sum", "mean", "max") for v in values]


@pytest.mark.parametrize(
    ("everywhere", "expected"), [(False, [2, -2, 2, -2, 2, -2]), (True, [7, -1, 3.5, -0.5, 5, 1])], ids=["one", "all"]
)
def test_every_reduction_leaves_out_a_rank_that_is_kept_in_step(ranks, everywhere, expected):
    for found in ranks(2).run(_reduced, everywhere, timeout=60):
        assert found == expected
