"""What `compute_loss` sees in training: a batch of one process, whatever the plan and the accumulation.

The loss of an optimizer step is the mean over its R batches, micro-batches of all data ranks without dummy batches:

    loss = (sum over the batches of what `compute_loss` returns) / R

Losses that divide a sum by `num_items_in_batch` are handed N / R in its place, the targets of a batch on average (N of
the step), so theirs is the sum over all targets divided by N. Losses that do not are means over their batch. So nobody
has to know which of them a loss is, and a loss may add terms of both kinds.

The stock Trainer hands over N, adds up the losses of micro-batches and multiplies by the number of ranks, wherever a
model's forward takes keyword arguments: right for losses that divide by N, and too large for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_veomni.expert import counting_no_tokens
from hf_veomni.hf.require import override

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_veomni.mesh import ParallelState

    class _Trainer(Trainer):
        """The Trainer class behind the mixins, which may be one of another library, with arguments of ours."""

        args: Any
        model: Any
        optimizer: Any
        lr_scheduler: Any
        compute_loss: Any
        parallel_state: ParallelState

else:
    _Trainer = object

_LIBRARIES = ("hf_veomni", "transformers", "trl")


def overrides(trainer: Any, *names: str) -> bool:
    """Whether a user has replaced one of these methods of a trainer: in a class of their own or on the instance."""
    own = [owner for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] not in _LIBRARIES]
    return any(name in vars(place) for place in (trainer, *own) for name in names)


class _AloneAccelerator:
    """An Accelerator as one process has it: losses that multiply by the number of processes do it for DDP's mean."""

    num_processes = 1

    def __init__(self, accelerator: Any) -> None:
        vars(self)["_accelerator"] = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_accelerator"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_accelerator"], name, value)


class LossMixin(_Trainer):
    """Overrides of Trainer for the normalisation of the loss, whoever computes it."""

    _num_real: float = 0  # batches of the window that are no dummy batches, a data rank
    _computes_loss = False
    _counted = False  # whether Trainer has scaled a loss as one that was divided by a number of items

    @override
    def get_tp_size(self) -> int:
        """Ranks that share a batch: those of an SP group.

        Trainer divides `num_processes` by it to scale a loss, for which there is nothing to do here.
        """
        if self._computes_loss:
            self._counted = True
            return self.accelerator.num_processes
        return self.parallel_state.sp_size

    @contextmanager
    def _as_one_process(self, own: bool) -> Iterator[None]:
        """Around the computation of a loss. `own`: by code of the user, who may look at the number of processes."""
        accelerator, outer = self.accelerator, self._computes_loss
        self._computes_loss, self._counted = True, False
        if own:
            self.accelerator = _AloneAccelerator(accelerator)
        try:
            yield
        finally:
            self.accelerator, self._computes_loss = accelerator, outer

    def _items_a_batch(self, num_items: Any, batches: float) -> Any:
        if num_items is None or batches == 1:
            return num_items
        exact = next(self.model.parameters()).dtype == torch.float64
        return torch.as_tensor(num_items).to(torch.float64 if exact else torch.float32) / batches

    @contextmanager
    def _averaging(self, factor: float) -> Iterator[None]:
        """Around a `training_step`: its loss counts `factor` (0 for a dummy batch) in the mean over the window.

        What `compute_loss` returns is scaled already, so that a `training_step` of the user's own may do without what
        Trainer's does. A class that says `loss_is_scaled_for_ga` takes the mean over the window itself, and what is
        left is the one over the data ranks.
        """
        kept = {name: vars(self)[name] for name in ("compute_loss", "loss_is_scaled_for_ga") if name in vars(self)}
        compute_loss: Callable[..., Tensor] = self.compute_loss
        scaled = bool(self.loss_is_scaled_for_ga)
        own, real, ranks = overrides(self, "compute_loss"), self._num_real or 1, self.parallel_state.dp_size

        def averaged(
            model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            items = self._items_a_batch(num_items_in_batch, ranks if scaled else ranks * real)
            self.current_gradient_accumulation_steps = real if scaled else 1
            with self._as_one_process(own), nullcontext() if factor else counting_no_tokens():
                found = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)
            self.current_gradient_accumulation_steps = real
            loss, *outputs = found if isinstance(found, tuple) else (found,)
            loss = loss * factor if scaled else loss * factor / real
            return (loss, *outputs) if outputs else loss

        self.compute_loss, self.loss_is_scaled_for_ga = averaged, True
        try:
            yield
        finally:
            del self.compute_loss, self.loss_is_scaled_for_ga
            for name, value in kept.items():
                setattr(self, name, value)
