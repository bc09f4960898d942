"""Saving and resuming on ranks: plain formats on disk, exact continuation, errors on every rank."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.ranks.training import (
    Outcome,
    Run,
    assert_same_training,
    full,
    outcome,
    relative,
    tiny_model,
    train_stock,
)

PLANS = [(2, "sp=2"), (2, "dp_shard=2"), (4, "sp=2,dp_shard=2"), (4, "dp_replicate=2,sp=2")]
plans = pytest.mark.parametrize(("world", "plan"), PLANS, ids=[plan for _, plan in PLANS])


def _trainer(plan: str, run: Run, directory: Path, **options: Any):
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    arguments = OmniTrainingArguments(**run.all_arguments(plan=plan, output_dir=str(directory)))
    return OmniTrainer(model=run.model(), args=arguments, **run.data(), **run.options, **options)


def _save(plan: str, run: Run, directory: Path) -> dict[str, torch.Tensor]:
    """Train a little, evaluate (which gathers parameters), save. Returns the weights in full."""
    trainer = _trainer(plan, run, directory)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(directory / "saved"))
    return {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}


@plans
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_model_opens_in_plain_transformers(ranks, tmp_path, world, plan, tied):
    run = Run(eval_rows=2, config={"tie_word_embeddings": tied}, arguments={"max_steps": 2})
    weights = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "saved/generation_config.json").is_file()
    assert (tmp_path / "saved/training_args.bin").is_file()
    stored = model.state_dict()
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())
    assert not any(entry.name.endswith(".incomplete") for entry in tmp_path.iterdir())


@plans
def test_saved_adapter_opens_in_plain_peft(ranks, tmp_path, world, plan):
    run = Run(lora=True, eval_rows=2, arguments={"max_steps": 2})
    weights = ranks(world).run(_save, plan, run, tmp_path, timeout=120)[0]
    stored = load_file(tmp_path / "saved/adapter_model.safetensors")
    named = {name.replace(".default", "").replace(".modules_to_save", ""): name for name in weights}
    trained = {key for key, name in named.items() if "lora_" in name or "modules_to_save" in name}
    assert stored.keys() == trained, "the adapters and the trained head, nothing of the base"
    assert all(torch.equal(tensor, weights[named[key]]) for key, tensor in stored.items())
    opened = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    found = opened.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    mapping = json.loads((tmp_path / "saved/adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "LlamaForCausalLM"
    assert mapping["parent_library"].startswith("transformers.models.llama")


def _train_and_resume(plan: str, run: Run, directory: Path, other: str) -> tuple[Outcome, Outcome]:
    """A run with checkpoints, and a second trainer that goes on from the middle one."""
    whole = _trainer(plan, run, directory)
    uninterrupted = outcome(whole, whole.train().training_loss)
    dist.barrier()
    if dist.get_rank() == 0:
        for checkpoint in directory.glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) > run.arguments["save_steps"]:
                shutil.rmtree(checkpoint)
    dist.barrier()
    resumed = _trainer(other, run, directory)
    return uninterrupted, outcome(resumed, resumed.train(resume_from_checkpoint=True).training_loss)


def _assert_continues(whole: Outcome, resumed: Outcome, tolerance: float) -> None:
    assert relative(resumed.losses, whole.losses) <= tolerance
    assert relative(resumed.norms, whole.norms) <= tolerance
    assert resumed.state == whole.state
    for name, weight in whole.weights.items():
        assert (resumed.weights[name] - weight).abs().max() <= tolerance, name


@plans
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_is_exact(ranks, tmp_path, world, plan, lora):
    """From the middle of the second epoch, with shuffling, momentum, a schedule and dropout."""
    rows, steps = (8, 6) if plan.startswith("sp=2") and world == 2 else (16, 6)
    run = Run(
        lora=lora,
        num_rows=rows,
        config={} if lora else {"attention_dropout": 0.1},
        arguments={"save_strategy": "steps", "save_steps": steps - 1, "max_steps": steps + 1},
    )
    for whole, resumed in ranks(world).run(_train_and_resume, plan, run, tmp_path, plan, timeout=180):
        assert whole.state["num_train_epochs"] >= 2
        _assert_continues(whole, resumed, 0.0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("plan", "other"), [("sp=4", "sp=2,dp_shard=2"), ("dp_shard=4", "dp_replicate=2,sp=2")], ids=lambda plan: plan
)
def test_resume_under_another_plan(ranks, tmp_path, plan, other, lora):
    """Same weights and optimizer state; the batch per step is held by the accumulation."""
    results = ranks(4).run(_resume_elsewhere, plan, other, lora, tmp_path, timeout=180)
    for before, after in results:
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name
    assert any("exp_avg" in name for name in results[0][0])


def _whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, options=options)
    found = {**trainer.model.state_dict(), **optimizer}
    return {name: full(tensor).clone() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


class _Stop(TrainerCallback):
    """Ends the run at its first step, keeping the state the step would have started from."""

    trainer: Any = None
    state: dict[str, torch.Tensor] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = self.state or _whole_state(self.trainer)
        control.should_training_stop = True


def _resume_elsewhere(plan: str, other: str, lora: bool, directory: Path):
    run = Run(
        lora=lora,
        num_rows=8,
        arguments={"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "logging_steps": 5},
    )
    first = _trainer(plan, run, directory)
    first.train()
    before = _whole_state(first)
    dist.barrier()
    longer = Run(lora=lora, num_rows=8, arguments=run.arguments | {"max_steps": 3})
    stop = _Stop()
    second = _trainer(other, longer, directory, callbacks=[stop])
    stop.trainer = second
    second.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    return before, stop.state


def _resume(plan: str, run: Run, directory: Path) -> Outcome:
    trainer = _trainer(plan, run, directory)
    return outcome(trainer, trainer.train(resume_from_checkpoint=True).training_loss)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_on_ranks_what_the_stock_trainer_began(ranks, tmp_path, lora):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "output_dir": str(tmp_path)}
    run = Run(lora=lora, arguments=arguments)
    trainer = Trainer(model=run.model(), args=TrainingArguments(**run.all_arguments()), **run.data())
    whole = outcome(trainer, trainer.train().training_loss)
    shutil.rmtree(tmp_path / "checkpoint-5")
    for resumed in ranks(2).run(_resume, "sp=2", run, tmp_path, timeout=120):
        _assert_continues(whole, resumed, 1e-5)


def _begin(plan: str, run: Run, directory: Path) -> None:
    _trainer(plan, run, directory).train()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_in_one_process_what_ranks_began(ranks, tmp_path, lora):
    constant = {"lr_scheduler_type": "constant"}
    run = Run(lora=lora, arguments=constant | {"save_strategy": "steps", "save_steps": 3, "max_steps": 3})
    ranks(2).run(_begin, "sp=2", run, tmp_path, timeout=120)
    longer = Run(lora=lora, arguments=constant | {"max_steps": 5})
    resumed = _resume("", longer, tmp_path)
    reference = train_stock(longer)
    assert relative(resumed.losses[-2:], reference.losses[-2:]) < 1e-5
    assert relative(resumed.norms[-2:], reference.norms[-2:]) < 1e-5


def _best(plan: str, run: Run, directory: Path) -> tuple[list[str], str, dict[str, torch.Tensor]]:
    trainer = _trainer(plan, run, directory)
    trainer.train()
    weights = {name: full(tensor).clone() for name, tensor in trainer.model.state_dict().items()}
    dist.barrier()
    return sorted(p.name for p in directory.glob("checkpoint-*")), trainer.state.best_model_checkpoint, weights


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_best_model_and_save_total_limit(ranks, tmp_path, lora):
    """A learning rate that ruins the model makes the first checkpoint the best one."""
    run = Run(
        lora=lora,
        num_rows=8,
        eval_rows=3,
        arguments={
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 4,
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "per_device_eval_batch_size": 1,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
        },
    )
    kept, best, weights = ranks(4).run(_best, "sp=2,dp_shard=2", run, tmp_path, timeout=120)[0]
    assert len(kept) == 2 and Path(best).name in kept
    if lora:
        stored = PeftModel.from_pretrained(tiny_model(), best).state_dict()
    else:
        stored = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())


def _refused(plan: str, run: Run, directory: Path, checkpoint: Any) -> None:
    _trainer(plan, run, directory).train(resume_from_checkpoint=checkpoint)


def test_missing_checkpoint_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2).raises(_refused, "sp=2", Run(), tmp_path, True, match="No complete checkpoint", timeout=60)
    missing = str(tmp_path / "nowhere")
    ranks(2).raises(_refused, "sp=2", Run(), tmp_path, missing, match="missing or incomplete", timeout=60)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("trainer_state.json", "no trainer_state.json"),
        ("model.safetensors", "holds no weights"),
        ("scheduler.pt", "no optimizer and scheduler state"),
        ("optimizer/index.json", "missing or incomplete"),
    ],
)
def test_incomplete_checkpoint_is_refused_on_every_rank(ranks, tmp_path, removed, message):
    run = Run(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    ranks(2).run(_begin, "sp=2", run, tmp_path, timeout=120)
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / removed).unlink()
    ranks(2).raises(_refused, "sp=2", run, tmp_path, True, match=f"'{removed}' is missing", timeout=60)
    (checkpoint / "manifest.json").unlink()  # as the stock Trainer would have written it
    ranks(2).raises(_refused, "sp=2", run, tmp_path, str(checkpoint), match=message, timeout=60)


def _train_to(plan: str, run: Run, directory: Path) -> Outcome:
    trainer = _trainer(plan, run, directory)
    return outcome(trainer, trainer.train(resume_from_checkpoint=True).training_loss)


def test_a_damaged_checkpoint_hides_no_older_one(ranks, tmp_path):
    """One flipped bit in the newest: training goes on from the one before, to the same end."""
    run = Run(arguments={"save_strategy": "steps", "save_steps": 2, "max_steps": 6})
    expected = ranks(2).run(_begin_and_end, "sp=2", run, tmp_path, timeout=120)
    shutil.rmtree(tmp_path / "checkpoint-6")
    weights = tmp_path / "checkpoint-4/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    (tmp_path / ".incomplete/checkpoint-6").mkdir(parents=True)  # of a save that was killed
    found = ranks(2).run(_train_to, "sp=2", run, tmp_path, timeout=120)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())
    assert not (tmp_path / ".incomplete").exists()
    assert sorted(entry.name for entry in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]


def _begin_and_end(plan: str, run: Run, directory: Path) -> Outcome:
    trainer = _trainer(plan, run, directory)
    return outcome(trainer, trainer.train().training_loss)


def _other_model(plan: str, directory: Path, config: dict[str, int], lora: bool) -> None:
    run = Run(lora=lora, config=config, arguments={"max_steps": 2})
    _trainer(plan, run, directory).train(resume_from_checkpoint=True)


def test_checkpoint_of_another_model_is_refused_on_every_rank(ranks, tmp_path):
    run = Run(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    ranks(2).run(_begin, "sp=2", run, tmp_path, timeout=120)
    wide, shallow = {"hidden_size": 64}, {"num_hidden_layers": 1}
    ranks(2).raises(_other_model, "sp=2", tmp_path, wide, False, match="has shape", timeout=60)
    ranks(2).raises(_other_model, "sp=2", tmp_path, shallow, False, match="of another model", timeout=60)
    ranks(2).raises(_other_model, "sp=2", tmp_path, {}, True, match="no checkpoint of the adapter", timeout=60)


def _load_best(plan: str, run: Run, directory: Path) -> None:
    trainer = _trainer(plan, run, directory)
    trainer.train()
    dist.barrier()
    if dist.get_rank() == 0:
        weights = directory / "checkpoint-1/model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    dist.barrier()
    trainer.state.best_model_checkpoint = str(directory / "checkpoint-1")
    trainer._load_best_model()


def test_a_damaged_best_model_is_not_loaded(ranks, tmp_path):
    run = Run(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    ranks(2).raises(
        _load_best, "sp=2", run, tmp_path, match="contents of 'model.safetensors' have changed", timeout=60
    )


def _write_optimizer(plan: str, run: Run, directory: Path) -> dict[str, torch.Tensor]:
    from hf_veomni.checkpoint.state import optimizer_state, save_optimizer

    trainer = _trainer(plan, run, directory)
    trainer.train()
    save_optimizer(trainer.model, trainer.optimizer, directory / "optimizer")
    save_optimizer(trainer.model, trainer.optimizer, directory / "optimizer")  # over what is there
    state = optimizer_state(trainer.model, trainer.optimizer)
    return {name: full(value).clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


@plans
def test_torch_itself_reads_sharded_state(ranks, tmp_path, world, plan):
    """By the reader of torch.distributed.checkpoint, in one process."""
    from torch.distributed import checkpoint as dcp

    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/shard-00009-model-00001-of-00001.safetensors").touch()  # of a larger world
    expected = ranks(world).run(_write_optimizer, plan, Run(arguments={"max_steps": 1}), tmp_path, timeout=90)[0]
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "optimizer")), no_dist=True)
    assert any(name.endswith("exp_avg") for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@contextmanager
def _small_files(limit: int | None) -> Iterator[None]:
    """Inside, no file can grow beyond `limit` bytes: what a full disk looks like. None leaves the disk alone."""
    if limit is None:
        yield
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_with_little_space(plan: str, directory: Path, limit: int | None, rank: int, checkpoint: bool) -> str:
    """The error that a save raises on this rank when files on `rank` cannot grow beyond `limit` bytes."""
    trainer = _trainer(plan, Run(arguments={"max_steps": 1}), directory)
    trainer.train()
    with _small_files(limit if dist.get_rank() == rank else None):
        try:
            if checkpoint:
                trainer._save_checkpoint(trainer.model, None)
            else:
                trainer.save_model(str(directory / "saved"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("limit", "rank"), [(4096, 0), (50_000, 0), (4096, 1), (1000, 1)])
def test_no_space_leaves_no_checkpoint_and_reaches_every_rank(ranks, tmp_path, limit, rank):
    errors = ranks(2).run(_save_with_little_space, "sp=2", tmp_path, limit, rank, True, timeout=90)
    assert all("File too large" in error or "disk full" in error for error in errors), errors
    assert not list(tmp_path.iterdir())


def test_no_space_leaves_the_earlier_model(ranks, tmp_path):
    assert ranks(2).run(_save_with_little_space, "sp=2", tmp_path, None, 0, False, timeout=90) == ["", ""]
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    errors = ranks(2).run(_save_with_little_space, "sp=2", tmp_path, 4096, 0, False, timeout=90)
    assert all("File too large" in error for error in errors), errors
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_comparison_can_fail():
    run = Run(num_rows=4)
    one = train_stock(run)
    with pytest.raises(AssertionError):
        assert_same_training(train_stock(Run(num_rows=4, arguments={"learning_rate": 2e-3})), one)
