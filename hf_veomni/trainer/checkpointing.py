"""Saving, resuming and best models of the Trainer, for sharded parameters."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_veomni.checkpoint import (
    agree,
    load_optimizer,
    load_plain,
    load_stock_optimizer,
    save_optimizer,
    save_plain,
    together,
)
from hf_veomni.trainer.adapt import is_prepared

_Trainer: Any = object

OPTIMIZER_DIRECTORY = "optimizer"  # torch DCP, one file a rank, by parameter name
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def _is_complete(checkpoint: Path) -> bool:
    """Trainer writes its state last."""
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path:
    """The newest checkpoint under `output_dir` that was written to its end.

    Raises:
        ValueError: there is none.
    """
    root = Path(output_dir)
    found = [entry for entry in (root.iterdir() if root.is_dir() else ()) if _CHECKPOINT.fullmatch(entry.name)]
    found.sort(key=lambda entry: int(entry.name.rpartition("-")[2]))
    complete = [entry for entry in found if _is_complete(entry)]
    if not complete:
        partial = f"; {', '.join(e.name for e in found)} lack {TRAINER_STATE_NAME}" if found else ""
        raise ValueError(
            f"No complete checkpoint in `output_dir` ('{output_dir}'){partial}: start without "
            "`resume_from_checkpoint`, or name the directory of one."
        )
    return complete[-1]


def fit_groups(scheduler: dict[str, Any], count: int) -> dict[str, Any]:
    """A scheduler's state for another number of parameter groups: Trainer makes one for each mesh of the plan.

    Raises:
        ValueError: the groups had different schedules, so it is unknown which new group goes on with which.
    """
    fitted = dict(scheduler)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = scheduler.get(name)
        if isinstance(values, list) and len(values) != count:
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"The checkpoint's scheduler has {len(values)} parameter groups with different `{name}` ({values})"
                    f", this plan makes {count}: resume under the plan that wrote it."
                )
            fitted[name] = values[:1] * count
    return fitted


class CheckpointingMixin(_Trainer):
    """Overrides of Trainer for files.

    A checkpoint has Trainer's layout: the model or adapter in its plain format, scheduler, random states and trainer
    state; the optimizer lies in `optimizer/` as torch DCP, so that another plan can read it. An error on one rank is
    raised on all of them, and what was written of that checkpoint is removed.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not is_prepared(self.model):
            super()._save(output_dir, state_dict)
            return
        directory = Path(self.args.output_dir if output_dir is None else output_dir)
        save_plain(self.model, directory, write=self.args.should_save, extras=self._save_extras, state=state_dict)

    def _save_extras(self, directory: Path) -> None:
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(directory)
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = directory.exists()
        error: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as caught:
            error = caught
            if self.args.should_save:
                # Every step inside agrees on errors, so no rank writes any more.
                leftover = directory / TRAINER_STATE_NAME if existed else directory
                leftover.unlink(missing_ok=True) if existed else shutil.rmtree(leftover, ignore_errors=True)
        agree(error, f"Saving '{directory}'")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.parallel_state.world_size == 1:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.model, self.optimizer, Path(output_dir) / OPTIMIZER_DIRECTORY)
        with together(f"Saving the scheduler to '{output_dir}'"):
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_scaler(self, output_dir: str) -> None:
        with together(f"Saving the gradient scaler to '{output_dir}'"):
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with together(f"Saving the random state to '{output_dir}'"):
            super()._save_rng_state(output_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`. With `resume_from_checkpoint=True`, from the newest checkpoint that is complete.

        Raises:
            ValueError: no complete checkpoint there; on every rank.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Epochs that are done, and batches that are done of the next one.

        The length of a stream is unknown, and Trainer, which takes it for one epoch of `max_steps`, would skip in the
        first epoch what was read in several. The state tells: its epoch is epochs + batches / (steps * accumulation).
        """
        done = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        if checkpoint is None or num_epochs < sys.maxsize:
            return done
        saved = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        epochs = max(0, math.ceil(saved.epoch or 0) - 1)
        batches = ((saved.epoch or 0) - epochs) * saved.max_steps * self.args.gradient_accumulation_steps
        return epochs, 0 if self.args.ignore_data_skip else round(batches)

    def _find_checkpoint(self, wanted: str | bool) -> str:
        found: list[str | None] = [None]
        with together("Looking for the checkpoint"):
            path = last_complete_checkpoint(self.args.output_dir) if wanted is True else Path(str(wanted))
            if not _is_complete(path):
                raise ValueError(
                    f"`resume_from_checkpoint` ('{path}') is missing or incomplete (no {TRAINER_STATE_NAME} in it): "
                    "name a checkpoint directory, or True for the newest complete one."
                )
            found = [str(path)]
        if self.parallel_state.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        return found[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if is_prepared(target):
            load_plain(target, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, target)

    def _load_best_model(self) -> None:
        if not is_prepared(self.model):
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        load_plain(self.model, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        sharded, stock = Path(checkpoint) / OPTIMIZER_DIRECTORY, Path(checkpoint) / OPTIMIZER_NAME
        with together(f"Looking for the optimizer state in '{checkpoint}'"):
            missing = [p.name for p in (Path(checkpoint) / SCHEDULER_NAME,) if not p.is_file()]
            if missing or not (sharded.is_dir() or stock.is_file()):
                raise ValueError(
                    f"'{checkpoint}' holds no optimizer and scheduler state (`save_only_model`?): it cannot be "
                    "resumed from. To go on from its weights alone, load them with from_pretrained."
                )
        if self.parallel_state.world_size == 1 and not sharded.is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if sharded.is_dir():
            load_optimizer(self.model, self.optimizer, sharded)
        else:
            load_stock_optimizer(self.model, self.optimizer, stock)
        with together(f"Reading the scheduler of '{checkpoint}'"):
            stored = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
            self.lr_scheduler.load_state_dict(fit_groups(stored, len(self.optimizer.param_groups)))
