"""Disks that do not take or keep what a run writes: an error on every rank that names the file or the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import TrainerCallback

from hf_veomni.checkpoint.manifest import find_damage
from hf_veomni.trainer import in_use
from hf_veomni.trainer.in_use import sole_use
from tests.permissions import override_permissions
from tests.ranks.training import Run

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def _trainer(folder: Path, **more: Any) -> Any:
    from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments

    run = Run(arguments={**SAVING, **more.pop("arguments", {})})
    args = OmniTrainingArguments(**run.all_arguments(plan="dp_shard=2", output_dir=str(folder)))
    return OmniTrainer(model=run.model(), args=args, **run.data(), **more)


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Every rank calls it."""
    dist.barrier()
    folder.chmod(0o555)
    override_permissions(False)
    try:
        yield
    finally:
        override_permissions(True)
        dist.barrier()
        folder.chmod(0o755)


def _begins_read_only(folder: Path) -> None:
    with _read_only(folder):
        _trainer(folder / "run")


def _is_read_only_before(folder: Path) -> None:
    trainer = _trainer(folder)
    with _read_only(folder):
        trainer.train()


class _NowReadOnly(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            Path(args.output_dir).chmod(0o555)
            override_permissions(False)


def _becomes_read_only(folder: Path, arguments: dict[str, Any]) -> None:
    trainer = _trainer(folder, arguments=arguments, callbacks=[_NowReadOnly()])
    try:
        trainer.train()
    finally:
        override_permissions(True)


def test_a_folder_that_cannot_be_made_is_named_on_every_rank(ranks, tmp_path):
    match = r"`output_dir` \('.*run'\) cannot be written on .*Permission denied"
    ranks(2).raises(_begins_read_only, tmp_path, match=match, kind="OSError", timeout=60)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(ranks, tmp_path):
    match = r"`output_dir` \('.*'\) cannot be written on .*Permission denied"
    ranks(2).raises(_is_read_only_before, tmp_path, match=match, timeout=60)


def _begins(folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_use, "_WAIT", 0.3)
        _trainer(folder, arguments=arguments).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("arguments", [{}, {"save_strategy": "no"}], ids=["saves", "resumes"])
def test_a_folder_of_another_run_is_refused_on_every_rank(ranks, tmp_path, arguments):
    """Before anything in it is touched: what lies in `.incomplete` is being written."""
    written = tmp_path / ".incomplete" / "checkpoint-1" / "shard"
    written.parent.mkdir(parents=True)
    written.touch()
    match = rf"`output_dir` \('{tmp_path}'\) is in use by another run \(process {os.getpid()} on "
    with sole_use(tmp_path):
        ranks(2).raises(_begins, tmp_path, arguments, match=match, timeout=60)
    assert written.exists()


@pytest.mark.parametrize("arguments", [{}, {"async_save": True}], ids=["plain", "async"])
def test_a_folder_that_becomes_read_only_ends_training_on_every_rank(ranks, tmp_path, arguments):
    match = f"Permission denied: '{tmp_path}"
    ranks(2).raises(_becomes_read_only, tmp_path, arguments, match=match, kind="OSError", timeout=60)
    tmp_path.chmod(0o755)
    assert [entry.name for entry in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


# What is damaged, and whether the manifest is there to tell.
FILES = ["model.safetensors", "optimizer/shard-00001*", "scheduler.pt", "rng_state_1.pth"]


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    place = len(data) - 5
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _resume_from_damaged(folder: Path, cases: list[tuple[str, str, bool]]) -> list[str]:
    """The error on this rank for each damage."""
    checkpoint = folder / "checkpoint-1"
    trainer = _trainer(folder, arguments={"max_steps": 1})
    trainer.train()
    trainer.args.max_steps = 2  # else nothing is left to do, and a rank does not read its random state
    manifest, errors = (checkpoint / "manifest.json").read_bytes(), []
    for pattern, damage, known in cases:
        dist.barrier()
        path = next(checkpoint.glob(pattern))
        whole = path.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes({"cut": _cut, "flip": _flip}[damage](whole))
            if not known:
                (checkpoint / "manifest.json").unlink()
        dist.barrier()
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint))
            errors.append("none")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes(whole)
            (checkpoint / "manifest.json").write_bytes(manifest)
    return errors


def test_a_damaged_file_is_named_on_every_rank(ranks, tmp_path):
    """With the manifest any change; without it what cannot be read."""
    cases = [(name, damage, True) for name in FILES for damage in ("cut", "flip")]
    cases += [(name, "cut", False) for name in FILES]
    for errors in ranks(2).run(_resume_from_damaged, tmp_path, cases, timeout=90):
        for (name, _, _), error in zip(cases, errors, strict=True):
            assert error.startswith(("ValueError", "OSError")) and name.rstrip("*") in error, (name, errors)


def _cannot_remove(folder: Path, arguments: dict[str, Any]) -> None:
    from hf_veomni.trainer import held_folders

    def refuse(*args: Any) -> None:
        raise OSError("Stale file handle")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_folders, "put_surplus_aside", refuse)
        _trainer(folder, arguments=arguments).train()


@pytest.mark.parametrize("arguments", [{}, {"async_save": True}], ids=["plain", "async"])
def test_what_rank_0_cannot_remove_ends_training_on_every_rank(ranks, tmp_path, arguments):
    """It alone removes old checkpoints; the others would wait for it in the next step."""
    match = "Stale file handle"
    ranks(2).raises(_cannot_remove, tmp_path, arguments, match=match, kind="OSError", timeout=60)
    assert find_damage(tmp_path / "checkpoint-1", contents=True) is None
