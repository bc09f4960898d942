"""Saving, resuming and best models of the Trainer, for sharded parameters."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from hf_veomni.checkpoint import (
    agree,
    check_adapters,
    fit_groups,
    load_optimizer,
    load_plain,
    load_stock_optimizer,
    load_weights,
    naming_damage,
    optimizer_state,
    save_plain,
    share_state,
    together,
    weights_state,
    writes_whole,
)
from hf_veomni.checkpoint.convert import WEIGHTS_DIRECTORY, describe_adapters, describe_model
from hf_veomni.checkpoint.manifest import STAGING
from hf_veomni.hf.require import override
from hf_veomni.mesh import is_prepared
from hf_veomni.trainer.folders import (
    OPTIMIZER_DIRECTORY,
    check_checkpoint,
    last_complete_checkpoint,
    saves,
    tell_of_later_ones,
)
from hf_veomni.trainer.held_folders import HeldFolders
from hf_veomni.trainer.position import Position, Reading
from hf_veomni.trainer.saving import CheckpointSaver

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from hf_veomni.trainer.loop import BatchingMixin as _Trainer
else:
    _Trainer = object


def _load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Of a prepared model, from either kind of checkpoint."""
    with together(f"Comparing the adapters with '{checkpoint}'"):
        check_adapters(model, checkpoint)
    sharded = checkpoint / WEIGHTS_DIRECTORY
    if sharded.is_dir():
        load_weights(model, sharded)
    else:
        load_plain(model, checkpoint)


class CheckpointingMixin(_Trainer):
    """Overrides of Trainer for files.

    A checkpoint has Trainer's layout, with the optimizer sharded in `optimizer/`, where another plan can read it. It
    appears complete, with a manifest, or not at all. An error on one rank is raised on all of them.
    """

    _saver: CheckpointSaver | None = None
    _folders: HeldFolders | None = None
    _staging: Path | None = None  # in place of the run's directory while a checkpoint is written
    _resumed: Position | None = None  # where the checkpoint stands that this `train` goes on from
    _batches_per_epoch = 0  # of each data rank
    _gives_back = False  # somebody on the stack does; Trainer's `is_in_train` stays set by a `train` that failed

    @override
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not is_prepared(self.model):
            super()._save(output_dir, state_dict)
            return
        directory = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._saver is None or self._staging is None or not self.args.sharded_weights:
            save_plain(self.model, directory, write=self.args.should_save, extras=self._save_extras, state=state_dict)
            return
        whole, adapters = writes_whole(self.model), describe_adapters(self.model)
        state = share_state(weights_state(self.model), self.model, write=True)
        self._saver.add(state, directory / WEIGHTS_DIRECTORY, whole)
        with together(f"Saving the configuration to '{directory}'"):
            if self.args.should_save:
                describe_model(self.model, directory, adapters)
                self._save_extras(directory)

    def _save_extras(self, directory: Path) -> None:
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(directory)
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    @override
    def _get_output_dir(self, trial: object) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        with self._giving_back() as alone:
            self._write_checkpoint(model, trial)
            if alone:  # there is nothing beside which it could be written
                self._finish_save()

    @contextmanager
    def _giving_back(self) -> Iterator[bool]:
        """Around `train`, or a save outside of it: at the end, however it comes, no process writes beside this one,
        and other runs may have the folders. Yields whether this is the outer one."""
        outer, self._gives_back = not self._gives_back, True
        try:
            yield outer
        finally:
            if outer:
                saver, folders, self._saver, self._folders, self._beside = self._saver, self._folders, None, None, None
                self._gives_back = False
                with ExitStack() as ending:
                    for used in (folders, saver):  # first the saver, which may write still
                        if used is not None:
                            ending.callback(used.close)

    def _write_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Written beside its place, flushed, described by a manifest, then renamed: see `checkpoint.manifest`."""
        root, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._saver is None:
            self._saver = CheckpointSaver(self.args.async_save, self.args.ddp_timeout)
            self._beside = self._saver.poll if self.args.async_save else None
        written = self._saver.finish()
        with together(f"Cleaning up '{root}'"):
            if self.args.should_save:
                self._folders = self._folders or HeldFolders()
                self._folders.hold(root)
                self._folders.clean()
        if written is not None:
            self._rotate(written, beside=True)
        self._saver.begin()
        error: Exception | None = None
        with self._staged(root / STAGING):
            try:
                super()._save_checkpoint(model, trial)
            except Exception as caught:
                error = caught
        try:
            agree(error, f"Saving '{root / name}'")
            self._name_best(root)
            with together(f"Saving '{root / name}'"):
                if self.args.should_save:  # again: with the best one's own name
                    self.state.save_to_json(str(root / STAGING / name / TRAINER_STATE_NAME))
                    done = self.state.global_step, self.state.epoch or 0.0
                    Position.after(*done, self._batches_per_epoch, self._reading).write(root / STAGING / name)
            self._saver.publish(root / STAGING / name, root / name)
        except Exception:
            # Every step agrees on errors, so no rank writes any more.
            if self.args.should_save:
                shutil.rmtree(root / STAGING, ignore_errors=True)
            raise
        if not self.args.async_save:
            self._rotate(root / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(root / name))

    @contextmanager
    def _staged(self, staging: Path) -> Iterator[None]:
        """Let Trainer write below `staging`, and upload nothing from there, since it is about to move."""
        own = vars(self).get("_push_from_checkpoint")
        self._staging, self._push_from_checkpoint = staging, lambda checkpoint_folder: None
        try:
            yield
        finally:
            self._staging = None
            del self._push_from_checkpoint
            vars(self).update({} if own is None else {"_push_from_checkpoint": own})

    def _rotate(self, written: Path, beside: bool = False) -> None:
        with together(f"Removing checkpoints of '{written.parent}'"):
            if self._folders is not None:  # on the rank that writes
                best = self.state.best_model_checkpoint
                self._folders.rotate(written, self.args.save_total_limit, best, beside)

    def _finish_save(self) -> None:
        """Wait for what is written beside training. Collective, if something is."""
        if self._saver is not None and (written := self._saver.finish()) is not None:
            self._rotate(written)

    @override
    def _finalize_training(self, *args: object, **kwargs: object) -> Any:
        self._finish_save()
        return super()._finalize_training(*args, **kwargs)

    def _name_best(self, root: Path) -> None:
        """What Trainer could not find in the staging directory, or found there."""
        step = self.state.best_global_step
        if step and self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
            best = root / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if step == self.state.global_step or best.exists():
                self.state.best_model_checkpoint = str(best)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._saver is None or (self.parallel_state.world_size == 1 and not self.args.sharded_weights):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.model, self.optimizer)
        self._saver.add(state, Path(output_dir) / OPTIMIZER_DIRECTORY, writes_whole(self.model))
        with together(f"Saving the scheduler to '{output_dir}'"):
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @override
    def _save_scaler(self, output_dir: str) -> None:
        with together(f"Saving the gradient scaler to '{output_dir}'"):
            super()._save_scaler(output_dir)

    @override
    def _save_rng_state(self, output_dir: str) -> None:
        with together(f"Saving the random state to '{output_dir}'"):
            try:
                super()._save_rng_state(output_dir)
            except RuntimeError as error:  # torch.save, of a file that it cannot write to its end
                raise OSError(
                    f"The random state cannot be written to '{output_dir}' ({str(error).splitlines()[0]}): is the "
                    "disk full, or a quota used up?"
                ) from error

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with together(f"Reading the random state of '{checkpoint}'"):
            with naming_damage(Path(checkpoint) / f"rng_state{rank}.pth"):
                super()._load_rng_state(checkpoint)

    @override
    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trainer's `train`. With `resume_from_checkpoint=True`, from the newest checkpoint that is complete.

        Raises:
            ValueError: another run trains into `output_dir`; no complete checkpoint there, or one from which this run
                would not go on with the next rows; on every rank.
        """
        with self._giving_back():
            with together("Looking whether `output_dir` is in use"):
                if self.args.should_save:
                    self._hold_folders(resume_from_checkpoint, trial)
            checkpoint = self._find_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
            self._resumed = None if checkpoint is None else self._find_position(Path(checkpoint))
            return super().train(checkpoint, trial, *args, **kwargs)

    def _hold_folders(self, resume: str | bool | None, trial: object) -> None:
        """Of this `train`, if it saves; trials of a search, which may be other processes', have a folder each."""
        self._folders = self._folders or HeldFolders()
        if resume is True:
            self._folders.hold(Path(self.args.output_dir))
        if saves(self.args):
            self._folders.hold(Path(self._get_output_dir(trial)))

    @override
    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        """Epochs that are done, and batches that are done of the next one.

        Where the checkpoint does not say it, as Trainer counts. The length of a stream is unknown, and Trainer, which
        takes it for one epoch of `max_steps`, would skip in the first epoch what was read in several. The state tells:
        its epoch is epochs + batches / (steps * accumulation).
        """
        done = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return done
        if self.state.global_step >= max_steps and self.args.process_index == 0:
            logger.warning(
                f"Nothing is left to train: '{resume_from_checkpoint}' is at step {self.state.global_step}, and this "
                f"run ends with step {max_steps}, by `max_steps` or `num_train_epochs` and the rows there are."
            )
        if self._resumed is not None:
            return self._resumed.epoch, 0 if self.args.ignore_data_skip else self._resumed.batches(self._reading)
        if num_train_epochs < sys.maxsize:
            return done
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        epochs = max(0, math.ceil(saved.epoch or 0) - 1)
        batches = ((saved.epoch or 0) - epochs) * saved.max_steps * self.args.gradient_accumulation_steps
        return epochs, 0 if self.args.ignore_data_skip else round(batches)

    @override
    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Trainer's, with as many epochs as the steps take that are left, if those before were of another size."""
        made: Any = super().set_initial_training_values(args, dataloader)
        epochs, *values, batches, max_steps = made
        self._batches_per_epoch = batches
        if self._resumed is not None and args.max_steps > 0 and epochs < sys.maxsize:
            steps = max(0, max_steps - self._resumed.step)
            epochs = self._resumed.epochs_until(steps, batches, self._reading)
        return epochs, *values, batches, max_steps

    @property
    def _reading(self) -> Reading:
        return Reading.of(self.args, self.train_dataset, self.parallel_state.dp_size)

    def _find_position(self, checkpoint: Path) -> Position | None:
        """Where it stands, if this run can go on from there. Collective."""
        found: Position | None = None
        with together(f"Looking for the place of '{checkpoint}' in the data"):
            found = Position.read(checkpoint)
            if found is not None and not self.args.ignore_data_skip:
                found.check(self._reading, counts_steps=self.args.max_steps > 0)
        return found

    def _find_checkpoint(self, wanted: str | bool) -> str:
        """Rank 0 looks, since it reads every file of the checkpoint."""
        found: list[str | None] = [None]
        with together("Looking for the checkpoint"):
            if self._folders is not None:
                self._folders.clean()
            if self.args.process_index == 0:
                if wanted is True:
                    found = [str(last_complete_checkpoint(self.args.output_dir, contents=True))]
                else:
                    check_checkpoint(Path(str(wanted)))
                    found = [str(wanted)]
                    tell_of_later_ones(Path(str(wanted)), self.args.output_dir)
        if self.parallel_state.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        return found[0]

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if is_prepared(target):
            _load_weights(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, target)

    @override
    def _load_best_model(self) -> None:
        if not is_prepared(self.model):
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        with together("Looking for the best checkpoint"):
            if self.args.process_index == 0:
                check_checkpoint(best, "`load_best_model_at_end`", "the last weights are in the model still")
        _load_weights(self.model, best)

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        sharded, stock = Path(checkpoint) / OPTIMIZER_DIRECTORY, Path(checkpoint) / OPTIMIZER_NAME
        with together(f"Looking for the optimizer state in '{checkpoint}'"):
            if not ((Path(checkpoint) / SCHEDULER_NAME).is_file() and (sharded.is_dir() or stock.is_file())):
                raise ValueError(
                    f"'{checkpoint}' holds no optimizer and scheduler state (`save_only_model`?): it cannot be "
                    "resumed from. To go on from its weights alone, load them with from_pretrained."
                )
        if self.parallel_state.world_size == 1 and not sharded.is_dir():
            with naming_damage(stock):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        if sharded.is_dir():
            load_optimizer(self.model, self.optimizer, sharded)
        else:
            load_stock_optimizer(self.model, self.optimizer, stock)
        with together(f"Reading the scheduler of '{checkpoint}'"):
            with naming_damage(path := Path(checkpoint) / SCHEDULER_NAME):
                stored = torch.load(path, weights_only=True)
            self.lr_scheduler.load_state_dict(fit_groups(stored, len(self.optimizer.param_groups)))
