"""OmniTrainer with a plan of stages trains, evaluates and saves as the stock Trainer does in one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import transformers.trainer
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer

from tests.ranks.training import Outcome, PackedRows, Run, collate, relative, tiny_model, train_omni, train_stock


def _same(found: list[Outcome], expected: Outcome) -> None:
    seen: set[str] = set()
    for one in found:
        assert relative(one.losses, expected.losses) < 1e-5
        assert relative(one.norms, expected.norms) < 1e-5
        assert relative([one.train_loss], [expected.train_loss]) < 1e-5
        assert one.state == expected.state
        for name, weight in one.weights.items():
            assert (weight - expected.weights[name]).abs().max() < 1e-5, name
            seen.add(name)
    assert seen == expected.weights.keys()


@pytest.mark.parametrize(
    ("world", "plan", "data_ranks", "lora"),
    [
        (2, "pp=2", 1, False),
        pytest.param(2, "pp=2", 1, True, marks=pytest.mark.slow),
        (4, "pp=2,dp_shard=2", 2, False),
        pytest.param(4, "pp=2,sp=2", 1, False, marks=pytest.mark.slow),
    ],
)
def test_training_equals_one_process(ranks, world: int, plan: str, data_ranks: int, lora: bool) -> None:
    """9 rows: uneven token counts, a short last window, a data rank without a last row, clipping."""
    run = Run(lora=lora, arguments={"gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1})
    expected = train_stock(run, data_ranks)
    assert min(expected.norms) > 0.5, "clipping must be active"
    _same(ranks(world).run(train_omni, plan, run, timeout=120), expected)


def _count_emptied(plan: str) -> int:
    """How often the allocator's cache is emptied: every other step, after each of its forwards."""
    from hf_veomni.trainer import stages

    run = Run(num_rows=4, arguments={"torch_empty_cache_steps": 2, "num_train_epochs": 1})
    with mock.patch.object(stages if plan else transformers.trainer, "clear_device_cache") as emptied:
        train_omni(plan, run) if plan else train_stock(run)
    return emptied.call_count


def test_the_cache_is_emptied_as_often_as_in_one_process(ranks) -> None:
    assert ranks(2).run(_count_emptied, "pp=2", timeout=60) == [_count_emptied("")] * 2 == [2, 2]


def _evaluate_and_save(plan: str, folder: str) -> tuple[float, torch.Tensor]:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(eval_rows=5)
    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    trainer: Any = OmniTrainer(model=tiny_model(), args=arguments, **run.data())
    loss = trainer.evaluate()["eval_loss"]
    found = trainer.predict(run.data()["eval_dataset"])
    trainer.save_model(folder)
    return loss, torch.as_tensor(found.predictions)


@pytest.mark.parametrize(("world", "plan"), [(2, "pp=2"), pytest.param(4, "pp=2,dp_shard=2", marks=pytest.mark.slow)])
def test_evaluation_prediction_and_saving_equal_one_process(ranks, tmp_path, world: int, plan: str) -> None:
    from transformers import TrainingArguments

    run = Run(eval_rows=5)
    arguments = run.all_arguments(per_device_eval_batch_size=1)
    stock: Any = Trainer(model=tiny_model(), args=TrainingArguments(**arguments), **run.data())
    rows = run.data()["eval_dataset"]
    total = count = 0.0
    for index in range(len(rows)):
        labels = sum(label != -100 for label in rows[index]["labels"][1:])
        total, count = total + stock.evaluate([rows[index]])["eval_loss"] * labels, count + labels
    for loss, predictions in ranks(world).run(_evaluate_and_save, plan, str(tmp_path), timeout=120):
        assert loss == pytest.approx(total / count, rel=1e-5)
        assert predictions.shape[0] == len(rows)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in tiny_model().named_parameters():
        assert torch.equal(dict(saved.named_parameters())[name], parameter), name


def _loop(plan: str) -> tuple[list[float], list[list[int]]]:
    from hf_veomni import OmniParallelismConfig, prepare_omni, run_window

    accelerator: Any = Accelerator(cpu=True, parallelism_config=OmniParallelismConfig(plan))
    model: Any = prepare_omni(tiny_model(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    loader = DataLoader(PackedRows(8), batch_size=1, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = list(loader)
    figures = []
    for begin in range(0, len(batches), 2):
        loss = run_window(model, batches[begin : begin + 2])
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        figures += [loss.item(), norm.item()]
    return figures, [batch["input_ids"].flatten().tolist() for batch in batches]


@pytest.mark.parametrize(("world", "plan", "data_ranks"), [(2, "pp=2", 1), (4, "pp=2,dp_shard=2", 2)])
def test_accelerate_loop_equals_one_process(ranks, world: int, plan: str, data_ranks: int) -> None:
    model, rows = tiny_model(), PackedRows(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    wanted: list[float] = []
    for begin in range(0, 8, 2 * data_ranks):
        batches = [collate([rows[i]]) for i in range(begin, begin + 2 * data_ranks)]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        losses = [model(**batch, num_items_in_batch=items, use_cache=False).loss for batch in batches]
        sum(losses).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        wanted += [sum(loss.item() for loss in losses), norm.item()]
    found = ranks(world).run(_loop, plan, timeout=120)
    for figures, _ in found:
        assert relative(figures, wanted) < 1e-5
    assert [read for _, read in found[:data_ranks]] == [read for _, read in found[data_ranks:]]
    assert sum(len(read) for _, read in found[:data_ranks]) == 8


def _compiled() -> None:
    from hf_veomni.trainer import OmniTrainingArguments

    OmniTrainingArguments(**Run().all_arguments(plan="pp=2", torch_compile=True))


def _own_loss() -> None:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run()
    arguments = OmniTrainingArguments(**run.all_arguments(plan="pp=2"))
    OmniTrainer(model=tiny_model(), args=arguments, **run.data(), compute_loss_func=lambda *a, **k: a[0].logits.sum())


def _no_labels() -> None:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**Run().all_arguments(plan="pp=2"))
    rows: Any = [{"input_ids": [5, 6, 7]}] * 4
    OmniTrainer(model=tiny_model(), args=arguments, train_dataset=rows).train()


@pytest.mark.parametrize(
    ("case", "match"),
    [
        (_no_labels, "A batch has no `labels`"),
        (_compiled, r"`torch_compile` .* cannot be combined with `pp_size` \(2\)"),
        (_own_loss, r"`compute_loss_func` is given, and the last stage alone has logits"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refusals(ranks, case, match: str) -> None:
    ranks(2).raises(case, match=match)
