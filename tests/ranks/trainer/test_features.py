"""What else a Trainer user relies on: streams, loader workers, adapters, reporting, hub arguments, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from tests.ranks.training import (
    Run,
    assert_same_training,
    collate,
    full,
    lora_model,
    outcome,
    relative,
    tiny_model,
    train_omni,
    train_stock,
)


def _trainer(plan: str, run: Run, model: Any = None, **options: Any):
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan))
    model = model if model is not None else run.model()
    return OmniTrainer(model=model, args=arguments, **(run.data() | run.options | options))


def _row_stream(num_rows: int, shards: int):
    rows = [dict(row) for row in (Run(num_rows=num_rows).dataset(num_rows, 0)[i] for i in range(num_rows))]
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


def _streamed(plan: str, num_rows: int, shards: int, steps: int) -> tuple[list[float], list[float], int]:
    run = Run(arguments={"max_steps": steps})
    trainer = _trainer(plan, run, train_dataset=_row_stream(num_rows, shards))
    trainer.train()
    steps_seen = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return (
        [entry["loss"] for entry in steps_seen],
        [entry["grad_norm"] for entry in steps_seen],
        trainer.state.num_input_tokens_seen,
    )


def test_a_stream_with_uneven_shards_ends_together(ranks):
    """5 rows in 2 shards: a data rank of 3 rows, another of 2, which runs a dummy batch that counts nothing."""
    tokens = sum(len(row["input_ids"]) for row in _row_stream(5, 2))
    for losses, norms, seen in ranks(4).run(_streamed, "sp=2,dp_shard=2", 5, 2, 4, timeout=90):
        assert seen == 2 * tokens, "two epochs, each row once"
        assert len(losses) == 4 and all(norm > 0 for norm in norms)


def test_the_short_last_window_of_a_stream_is_a_step_of_its_own(ranks):
    """3 rows by 2: the same steps as from a dataset of known length, on ranks and in one process."""
    run = Run(num_rows=3, arguments={"train_sampling_strategy": "sequential", "max_steps": 4})
    expected = train_stock(run)
    results = [_streamed("", 3, 1, 4), *ranks(2).run(_streamed, "sp=2", 3, 1, 4, timeout=60)]
    for losses, norms, seen in results:
        assert relative(losses, expected.losses) < 1e-5
        assert relative(norms, expected.norms) < 1e-5
        assert seen == expected.state["num_input_tokens_seen"]


def test_a_stream_of_one_data_rank_equals_one_process(ranks):
    run = Run(arguments={"max_steps": 4})
    expected = _stock_stream(run)
    for losses, norms, seen in ranks(2).run(_streamed, "sp=2", 8, 2, 4, timeout=90):
        assert relative(losses, expected.losses) < 1e-5
        assert relative(norms, expected.norms) < 1e-5
        assert seen == expected.state["num_input_tokens_seen"]


def _stock_stream(run: Run):
    from transformers import TrainingArguments

    data = run.data() | {"train_dataset": _row_stream(8, 2)}
    trainer = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), **data)
    return outcome(trainer, trainer.train().training_loss)


def _rank_dependent(plan: str) -> None:
    def rows():
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(8):
            tokens = torch.randint(3, 60, (9,), generator=generator).tolist()
            yield {"input_ids": tokens, "labels": tokens}

    _trainer(plan, Run(arguments={"max_steps": 2}), train_dataset=IterableDataset.from_generator(rows)).train()


def test_different_rows_within_an_sp_group_are_refused_on_every_rank(ranks):
    ranks(2).raises(_rank_dependent, "sp=2", match="form an SP group and must read the same rows", timeout=60)


def _noisy(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that draws: masks tokens at random."""
    batch = collate(rows)
    batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.3, 5, batch["input_ids"])
    return batch


def _workers(plan: str, workers: int) -> list[list[int]]:
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False  # ranks of the harness may not have children else
    arguments = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": "fork" if workers else None}
    trainer = _trainer(plan, Run(num_rows=8, arguments=arguments), data_collator=_noisy)
    return [batch["input_ids"].flatten().tolist() for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("workers", [0, 1])
def test_random_collators_draw_alike_within_an_sp_group(ranks, workers):
    found = ranks(4).run(_workers, "sp=2,dp_shard=2", workers, timeout=90)
    assert found[0] == found[1] and found[2] == found[3]
    assert found[0] != found[2]


def _adapters(plan: str, directory: Path) -> list[str]:
    run = Run(arguments={"max_steps": 2, "output_dir": str(directory), "learning_rate": 0.1})
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = _trainer(plan, run, peft_config=lora)
    trainer.train()
    trainer.save_model()
    return [name for name, p in trainer.model.named_parameters() if p.requires_grad]


def test_peft_config_adds_adapters_before_sharding(ranks, tmp_path):
    names = ranks(2).run(_adapters, "sp=2", tmp_path, timeout=90)[0]
    assert names and all("lora_" in name for name in names)
    stored = PeftModel.from_pretrained(tiny_model(), tmp_path).state_dict()
    assert all(stored[name].abs().max() > 0 for name in names)


def _from_path(plan: str, checkpoint: Path, directory: Path) -> None:
    run = Run(arguments={"max_steps": 1, "output_dir": str(directory)})
    trainer = _trainer(plan, run, model=str(checkpoint), processing_class=AutoTokenizer.from_pretrained(checkpoint))
    trainer.train()
    trainer.save_model()


def test_a_path_is_loaded_and_the_tokenizer_saved(ranks, tmp_path, tiny_checkpoint):
    """Nine query heads on two ranks, tied head."""
    ranks(2).run(_from_path, "sp=2", tiny_checkpoint, tmp_path / "out", timeout=90)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_attention_heads == 9
    text = "def main():"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(tiny_checkpoint)(text)["input_ids"]


class _Report(TrainerCallback):
    """A tracker of one's own, as `report_to` would add one: it writes on the main process."""

    def __init__(self) -> None:
        self.written: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            self.written.append(logs["loss"])


def _reported(plan: str) -> tuple[list[float], list[float]]:
    report = _Report()
    found = train_omni(plan, Run(arguments={"max_steps": 4, "logging_steps": 2}), callbacks=[report])
    return report.written, found.losses


def test_reports_come_from_the_main_process_and_average_the_steps(ranks):
    single = train_stock(Run(arguments={"max_steps": 4, "lr_scheduler_type": "linear"})).losses
    results = ranks(2).run(_reported, "sp=2", timeout=60)
    assert results[1][0] == []
    expected = [sum(single[:2]) / 2, sum(single[2:]) / 2]
    assert results[0][0] == pytest.approx(expected, rel=1e-5)


def _hub(plan: str, directory: Path) -> list[str]:
    """The calls that would go to the Hub."""
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    calls: list[str] = []

    class Offline(OmniTrainer):
        def init_hf_repo(self, token: str | None = None) -> None:
            calls.append("repo")
            self.hub_model_id = "user/model"

        def push_to_hub(self, commit_message: str | None = None, **kwargs: Any) -> None:
            calls.append(f"push {commit_message}")

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            calls.append(f"push {Path(checkpoint_folder).name}")

    run = Run(arguments={"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "output_dir": str(directory)})
    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan, push_to_hub=True, hub_strategy="every_save"))
    trainer = Offline(model=run.model(), args=arguments, **run.data())
    trainer.train()
    trainer.save_model()
    return calls


def test_hub_arguments_reach_the_trainers_own_methods(ranks, tmp_path):
    for calls in ranks(2).run(_hub, "sp=2", tmp_path, timeout=60):
        assert calls == ["repo", "push checkpoint-2", "push Model save"]


def _refused(plan: str, kind: str) -> None:
    from hf_veomni import prepare_omni

    run = Run()
    if kind == "optimizers":
        model = run.model()
        _trainer(plan, run, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None))
    elif kind == "layerdrop":
        model = run.model()
        model.config.layerdrop = 0.1
        _trainer(plan, run, model=model)
    elif kind == "other_plan":
        _trainer(plan, run, model=prepare_omni(run.model(), "dp_shard=2"))
    elif kind == "late_adapters":
        _trainer(plan, run, model=prepare_omni(run.model(), plan), peft_config=LoraConfig(target_modules=["q_proj"]))
    elif kind == "twice_adapters":
        _trainer(plan, run, model=lora_model(), peft_config=LoraConfig(target_modules=["q_proj"]))
    elif kind == "search":
        _trainer(plan, run).hyperparameter_search()
    elif kind == "stock_arguments":
        from transformers import TrainingArguments

        from hf_veomni.trainer import OmniTrainer

        OmniTrainer(model=run.model(), args=TrainingArguments(**run.all_arguments()))
    elif kind == "optim":
        run = Run(arguments={"optim": "adafactor"})
        _trainer(plan, run)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("optimizers", "`optimizers` holds parameters that are not the prepared model's"),
        ("layerdrop", "`layerdrop`"),
        ("other_plan", "was prepared for the plan"),
        ("late_adapters", "adapters are added before the parameters are sharded"),
        ("twice_adapters", "is a PeftModel already"),
        ("search", "`hyperparameter_search` cannot be combined with the plan"),
        ("stock_arguments", "must be OmniTrainingArguments"),
        ("optim", "`optim` .'adafactor'. cannot be combined with a plan"),
    ],
)
def test_what_does_not_go_with_a_plan_is_refused_on_every_rank(ranks, kind, message):
    ranks(2).raises(_refused, "sp=2", kind, match=message, timeout=60)


def _prepared_before(plan: str) -> Any:
    from hf_veomni import prepare_omni

    run = Run()
    trainer = _trainer(plan, run, model=prepare_omni(run.model(), plan))
    return outcome(trainer, trainer.train().training_loss)


def test_a_prepared_model_is_taken_as_it_is(ranks):
    expected = train_stock(Run())
    for found in ranks(2).run(_prepared_before, "sp=2", timeout=60):
        assert_same_training(found, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_process_trains_as_the_stock_trainer(lora):
    arguments = {"eval_strategy": "epoch", "per_device_eval_batch_size": 3}  # all rows in one batch
    run = Run(lora=lora, plain=True, eval_rows=3, arguments=arguments)
    expected = train_stock(run)
    found = train_omni("", replace(run, arguments=run.arguments | {"per_device_eval_batch_size": 1}))
    assert_same_training(found, expected)
    losses = [entry["eval_loss"] for entry in found.evaluations]
    assert losses == pytest.approx([entry["eval_loss"] for entry in expected.evaluations], rel=1e-5)


def _two_models(plan: str) -> tuple[Any, Any]:
    """Steps of two trainers in turn, and one of them alone."""
    run = Run(num_rows=4)
    first, second = _trainer(plan, run), _trainer(plan, Run(num_rows=4, config={"hidden_size": 64}))
    a = first.train().training_loss
    b = second.train().training_loss
    assert full(next(iter(second.model.parameters()))).ndim
    return a, b


def test_two_prepared_models_do_not_disturb_each_other(ranks):
    expected = [train_stock(Run(num_rows=4, config=config)).train_loss for config in ({}, {"hidden_size": 64})]
    for found in ranks(2).run(_two_models, "sp=2", timeout=60):
        assert relative(list(found), expected) < 1e-5
