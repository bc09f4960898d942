"""What is checked before the first step, in one process."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from hf_veomni.checkpoint.manifest import REMOVED, recover, write_manifest
from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments, preflight
from tests.ranks.training import Run

_Usage = namedtuple("_Usage", "total used free")


def _saving(run: Run, folder: Path, **more: Any) -> dict[str, Any]:
    return (
        run.all_arguments(output_dir=str(folder / "new" / "run"), save_strategy="steps", save_steps=1, max_steps=1)
        | more
    )


def _with_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**12, 0, free))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("more", [{}, {"save_only_model": True}, {"optim": "sgd"}], ids=["all", "model", "sgd"])
def test_the_bytes_of_a_checkpoint_are_those_of_the_stock_trainer(tmp_path: Path, lora: bool, more: dict) -> None:
    """Headers of files, the tokenizer and states of a few numbers come on top."""
    run = Run(lora=lora)
    stock = Trainer(model=run.model(), args=TrainingArguments(**_saving(run, tmp_path, **more)), **run.data())
    stock.train()
    folder = next((tmp_path / "new" / "run").glob("checkpoint-*"))
    large = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt")
    written = sum((folder / name).stat().st_size for name in large if (folder / name).exists())
    estimate = preflight.checkpoint_bytes(stock.model, stock.args)
    assert 0.6 * written - 40_000 < estimate <= written


def test_a_run_that_cannot_save_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    args = OmniTrainingArguments(**_saving(run, tmp_path))
    trainer = OmniTrainer(model=run.model(), args=args, **run.data())
    needed = preflight.checkpoint_bytes(trainer.model, args)
    _with_space(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match=r"`output_dir` \('.*new/run'\) has 0\.00 GB free on .*save_only_model"):
        trainer.train()
    assert trainer.state.global_step == 0
    _with_space(monkeypatch, needed)
    trainer.train()
    assert trainer.state.global_step == 1


def test_what_a_killed_run_left_takes_no_space_from_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is removed before the first save; what is complete is not."""
    run = Run()
    args = OmniTrainingArguments(**_saving(run, tmp_path))
    trainer, root = OmniTrainer(model=run.model(), args=args, **run.data()), Path(args.output_dir)
    needed = preflight.checkpoint_bytes(trainer.model, args)
    left = [root / ".incomplete/checkpoint-8/a", root / ".incomplete.old/checkpoint-4/a", root / f"{REMOVED}x/a/a"]
    for path in (*left, whole := root / ".incomplete/checkpoint-6/a"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(needed))
    write_manifest(whole.parent)
    for free, fits in ((needed - 1, True), (0, True), (-2 * needed, True), (-3 * needed, False)):
        _with_space(monkeypatch, free)
        assert (preflight._lack_of_place(trainer) is None) == fits
    recover(root)
    assert [path.name for path in root.iterdir()] == ["checkpoint-6"]


def test_a_run_that_saves_nothing_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_space(monkeypatch, 0)
    run = Run()
    args = OmniTrainingArguments(**_saving(run, tmp_path, save_strategy="no"))
    trainer = OmniTrainer(model=run.model(), args=args, **run.data())
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "60", True])
def test_a_limit_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`stall_timeout` \(.*\) must be a number of seconds"):
        OmniTrainingArguments(output_dir="x", stall_timeout=value)


@pytest.mark.parametrize("value", [-1, 0, float("nan"), float("inf"), "90", True, 59, 1801])
def test_a_limit_of_waits_that_does_not_fit_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`wait_timeout` \(.*\) must be .* from `stall_timeout` \(60.* \(1800\)"):
        OmniTrainingArguments(output_dir="x", wait_timeout=value)
    with pytest.raises(ValueError, match=r"`stall_timeout` \(0, which is not 0 then\)"):
        OmniTrainingArguments(output_dir="x", wait_timeout=90, stall_timeout=0)
    assert OmniTrainingArguments(output_dir="x", wait_timeout=90).wait_timeout == 90


def test_a_checkpoint_without_its_optimizer_is_none_to_go_on_from() -> None:
    with pytest.raises(ValueError, match="`save_only_model`.*cannot be combined with `enable_jit_checkpoint`"):
        OmniTrainingArguments(output_dir="x", save_only_model=True, enable_jit_checkpoint=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file where a folder should be")
    run = Run()
    args = OmniTrainingArguments(**_saving(run, tmp_path))
    (tmp_path / "new").unlink()
    trainer = OmniTrainer(model=run.model(), args=args, **run.data())
    shutil.rmtree(tmp_path / "new")
    (tmp_path / "new").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"`output_dir` \('.*new/run'\) cannot be written on .*\(Not a directory\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_moments_are_counted_of_optimizers_that_keep_them_so() -> None:
    """Not those of 8 bits, nor of an optimizer that was handed over."""
    run = Run()
    model = run.model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {}
    for optim in ("adamw_torch", "adamw_torch_8bit", "adamw_8bit", "adafactor", "sgd"):
        args = TrainingArguments(**run.all_arguments(optim=optim))
        found[optim] = preflight.checkpoint_bytes(model, args) / weights
    # torchao's moments of few bits are written in fp32.
    assert found == {"adamw_torch": 3.0, "adamw_torch_8bit": 3.0, "adamw_8bit": 1.0, "adafactor": 1.0, "sgd": 1.0}
    args = TrainingArguments(**run.all_arguments())
    assert preflight.checkpoint_bytes(model, args, "handed over") == weights
