"""What ends a run early, and how: a scheduler's signal, a gradient that is not finite, a rank that fails or stalls."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_veomni.hf.require import override
from hf_veomni.trainer.loaders import DummyBatch
from hf_veomni.trainer.nonfinite import (
    MOST_IN_A_ROW,
    Finder,
    NotFiniteError,
    first_of_all,
    has_broken_weights,
)
from hf_veomni.trainer.pace import Pace
from hf_veomni.trainer.preflight import check_before_training
from hf_veomni.trainer.signals import PREEMPTED, Preempted, Signals, say, shield_workers
from hf_veomni.trainer.trl import noting_nothing
from hf_veomni.trainer.watchdog import Watchdog

logger = logging.get_logger(__name__)

_USUAL, _EARLY = 10.0, 2.0  # times the longest part of a step, or of one without a limit yet, that another may take

if TYPE_CHECKING:
    from hf_veomni.trainer.checkpointing import CheckpointingMixin
    from hf_veomni.trainer.loop import BatchingMixin

    class _Trainer(CheckpointingMixin, BatchingMixin):
        pass

else:
    _Trainer = object


class _Interrupted(Exception):
    """An evaluation in training ends early: a signal came, and there is little time left."""


@dataclass
class Progress:
    """What the main thread is at.

    Attributes:
        count: places it has come to, the same on all ranks at the same place.
        measured: whether the place is a part of a step that shows how long another may take.
        limited: whether being here for long is a stall.
        usual: seconds that a part of a step may take, as far as those before it tell.
    """

    count: int = 0
    place: str = "starting"
    since: float = 0.0
    measured: bool = False
    limited: bool = False
    usual: float = 0.0

    def at(self, place: str, measured: bool = True, limited: bool = True) -> None:
        """Come to the next place."""
        now = time.monotonic()
        if self.measured:
            self.usual = max(self.usual, (now - self.since) * (_USUAL if self.limited else _EARLY))
        self.count, self.place, self.since = self.count + 1, place, now
        self.measured, self.limited = measured, limited


class GuardMixin(_Trainer):
    """Overrides of Trainer around the parts of a step."""

    _progress: Progress | None = None  # which the watchdog tells
    _batches: tuple[list[Any], Any] = ([], None)  # of the step, and its number of targets
    _first_batch = 0  # number in the epoch of the first of them, on this data rank
    _losses: list[Tensor] | None = None  # of the micro-batches of the step
    _looking = False  # at every value, after a gradient that was not finite
    _skipped = 0  # steps in a row
    _interruptible = False  # in an evaluation between two steps
    _epoch = 0
    _first_step = 0  # of this epoch
    _initial_step = sys.maxsize  # of this `train`; none yet

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`, checked before it begins, and guarded.

        Raises:
            ValueError: ranks that disagree, or no space for a checkpoint; on every rank.
            Preempted: a signal came, and `enable_jit_checkpoint` is set.
            NotFiniteError: a gradient that is not finite; on every rank.
            RankError: another rank failed, was lost or does not move.
        """
        with Signals() if self.args.enable_jit_checkpoint else nullcontext() as self._signals:
            self._asked, self._skipped, self._pace, self._initial_step = {}, 0, Pace(), sys.maxsize
            with self._watching():
                check_before_training(self, resume_from_checkpoint)
                return super().train(resume_from_checkpoint, *args, **kwargs)

    @override
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._pace = Pace()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self.parallel_state.world_size == 1 or not self.args.stall_timeout:
            yield
            return
        self._progress = Progress(since=time.monotonic())
        watchdog = Watchdog(self._progress, self.args.stall_timeout, self.args.wait_timeout or self.args.ddp_timeout)
        watchdog.start()
        ended: BaseException | None = None
        try:
            yield
        except BaseException as error:
            ended = watchdog.explain(error) or error
            if ended is not error:
                raise ended from error
            raise
        finally:
            watchdog.stop(ended)
            self._progress = None

    def _at(self, place: str, part: bool = True) -> None:
        """Tell the watchdog. What comes for the first time may take long: kernels are compiled, connections made. So
        may the second step, whose shapes are others, and the first one of an epoch, for which a stream begins anew."""
        if self._progress is not None:
            step = self.state.global_step
            part = part and step > self._first_step
            self._progress.at(place, part, limited=part and step > self._initial_step + 1)

    @override
    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        if self.args.enable_jit_checkpoint and is_training:
            shield_workers(loader)
        return loader

    @override
    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The run had come to its end when it was started again. Trainer looks after a step, so makes one more.
            self.control.should_training_stop = True
            return
        resumed = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
        self._first_batch = kwargs["steps_trained_in_current_epoch"] if resumed else 0
        self._epoch, self._batches = epoch, ([], None)
        self._first_step = self.state.global_step
        self._initial_step = min(self._initial_step, self._first_step)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    @override
    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        self._at(f"reading the batches of step {self.state.global_step + 1}")
        self._first_batch += len(self._batches[0])
        self._losses = []
        self._batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._batches

    @override
    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        place = f"micro-batch {self._micro_step + 1} of step {self.state.global_step + 1}"
        self._at(place, part=not self._looking)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._losses is not None and not self._looking:
            self._losses.append(loss)
        return loss

    @override
    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._at("evaluating a batch", part=False)
        if self.parallel_state.world_size == 1:
            self._interrupt(self._hear_alone())
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _hear_while_evaluating(self, facts: Tensor) -> None:
        self._hear(facts)
        self._interrupt(bool(self._asked))

    def _interrupt(self, asked: bool) -> None:
        if asked and self._interruptible:
            raise _Interrupted

    def _hear_alone(self) -> bool:
        """In one process, whether a signal came."""
        if self.parallel_state.world_size == 1 and self._signals is not None and self._signals.received:
            self._asked = {0: self._signals.received}
        return bool(self._asked)

    @override
    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, and what becomes of a step whose gradient is not finite.

        Raises:
            NotFiniteError: on every rank, where the step is not skipped.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._at(f"the update of step {self.state.global_step + 1}")
        if self.args.on_nonfinite == "ignore" or self.accelerator.scaler is not None:
            return norm  # a gradient scaler skips such steps itself
        value, losses = self._read(norm)
        if not torch.isfinite(value):
            self._not_finite(model, float(value))
        else:
            self._skipped = 0
            self._tell_of_losses(losses)
        return norm

    def _read(self, norm: Any) -> tuple[Tensor, Tensor]:
        """The norm and the losses of the step's micro-batches, on the host: one transfer."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        losses = [loss.detach().to(norm.device, torch.float32).reshape(()) for loss in self._losses or []]
        values = torch.stack([norm.detach().float().reshape(()), *losses]).cpu()
        return values[0], values[1:]

    def _tell_of_losses(self, losses: Tensor) -> None:
        """Of a loss that is not finite while the gradient is: it harms nothing, and Trainer would not tell."""
        for place in torch.nonzero(~losses.isfinite()).flatten().tolist():
            logger.warning(
                f"The loss of {self._describe_batch(place)} is {float(losses[place])} on rank {self._rank}, but its "
                "gradient is finite: training goes on. Has the batch any targets?"
            )

    @property
    def _rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def _describe_batch(self, place: int) -> str:
        """Micro-batch `place` of the step, so that somebody finds it again."""
        batch = self._batches[0][place]
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor))
        where = f"step {self.state.global_step + 1}, micro-batch {place + 1} of {len(self._batches[0])}"
        number = f"batch {self._first_batch + place} of data rank {self.parallel_state.dp_rank} in epoch "
        dummy = ", run again to keep in step" if isinstance(batch, DummyBatch) else ""
        return f"{where} ({number}{self._epoch}, counted from 0{dummy}: {shapes})"

    def _not_finite(self, model: nn.Module, norm: float) -> None:
        """Stop, or leave the step out. Collective."""
        step = self.state.global_step + 1
        model.zero_grad()
        found = self._look_again(model)
        model.zero_grad()  # what no gradient reaches stays as it is, optimizer states included
        what = f"The gradient norm of step {step} is {norm}. {found}"
        broken = has_broken_weights(model)
        self._skipped += 1
        if self.args.on_nonfinite == "skip" and not broken and self._skipped < MOST_IN_A_ROW:
            if self._rank == 0:
                logger.warning(f"{what} The step is left out, {self._skipped} in a row (`on_nonfinite='skip'`).")
            return
        if broken:
            way_out = "Weights are not finite before it already: resume from an earlier checkpoint."
        elif self.args.on_nonfinite == "skip":
            way_out = f"{self._skipped} steps in a row were left out: lower the learning rate, or look at the data."
        else:
            way_out = (
                "The weights are as before the step. Look at that batch, or resume from the last checkpoint with "
                "`on_nonfinite='skip'`, which leaves such steps out, or a lower learning rate."
            )
        raise NotFiniteError(f"{what} {way_out}")

    def _look_again(self, model: nn.Module) -> str:
        """Run the step again until a micro-batch shows it. Returns what was found, in words."""
        batches, items = self._batches
        throughput, self._throughput = self._throughput, None
        self._micro_step, self._partner, self._looking = 0, None, True
        finder = Finder(self._rank)
        try:
            with noting_nothing(self), torch.compiler.set_stance("force_eager"), finder.attached(model):
                for place, inputs in enumerate(batches):
                    finder.look_at_inputs(inputs)
                    loss = self.training_step(model, inputs, items)
                    finder.look_at_loss(loss)
                    finder.look_at_gradients(model)
                    first = first_of_all(finder.found)
                    if first is not None:
                        where = [self._describe_batch(place)]
                        if dist.is_initialized():
                            dist.broadcast_object_list(where, src=first.rank)
                        return f"It began on rank {first.rank} in {where[0]} with {first.text}."
        finally:
            self._throughput, self._looking = throughput, False
        return (
            "The step's batches, run again, were finite in every module: it began in the loss outside of the model, "
            "or, in one process, under another mask of dropout."
        )

    @override
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's. After a signal it saves, whatever else is due, and ends.

        Raises:
            Preempted: on every rank, when the checkpoint is in its place.
        """
        self._at(f"logging or evaluating after step {self.state.global_step}", part=False)
        self._hear_alone()
        if not self._asked:
            self._interruptible = True
            try:
                return super()._maybe_log_save_evaluate(*args, **kwargs)
            except _Interrupted:
                pass  # what was due beside the evaluation is done below
            finally:
                self._interruptible = False
        self.control.should_save, self.control.should_evaluate = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._finish_save()
        folder = f"{self._get_output_dir(None)}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._rank == 0:
            logger.warning(f"{say(self._asked)}: '{folder}' is saved, and training ends with exit code {PREEMPTED}.")
        raise Preempted(folder)

    @override
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._at(f"saving after step {self.state.global_step}", part=False)
        super()._save_checkpoint(model, trial)

    @override
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        slow = self._pace.take() if "loss" in logs else None
        if slow is not None and self._rank == 0:
            logger.warning(slow)
        super().log(logs, *args, **kwargs)
