"""What `compute_loss` sees: a batch of one process, whatever the plan and the accumulation, and full logits.

The loss of an optimizer step is the mean over its R batches, micro-batches of all data ranks without dummy batches:

    loss = (sum over the batches of what `compute_loss` returns) / R

Losses that divide a sum by `num_items_in_batch` are handed N / R in its place, the targets of a batch on average (N of
the step), so theirs is the sum over all targets divided by N. Losses that do not are means over their batch. So nobody
has to know which of them a loss is, and a loss may add terms of both kinds.

The stock Trainer hands over N, adds up the losses of micro-batches and multiplies by the number of ranks, wherever a
model's forward takes keyword arguments: right for losses that divide by N, and too large for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_veomni import hf
from hf_veomni.context import current
from hf_veomni.data.halves import split_batch
from hf_veomni.expert import counting_no_tokens
from hf_veomni.fsdp import as_plain, sharded_arithmetic
from hf_veomni.hf.require import override
from hf_veomni.loss import has_chunked_loss
from hf_veomni.mesh import get_parallel_state, is_prepared
from hf_veomni.pairs import run_pair
from hf_veomni.prepare import full_output

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

logger: Any = logging.get_logger(__name__)

_LIBRARIES = ("hf_veomni", "transformers", "trl")


def overrides(trainer: object, *names: str) -> bool:
    """Whether a user has replaced one of these methods of a trainer: in a class of their own or on the instance."""
    own = [owner for owner in type(trainer).__mro__ if owner.__module__.split(".")[0] not in _LIBRARIES]
    return any(name in vars(place) for place in (trainer, *own) for name in names)


@dataclass(frozen=True)
class MicroBatch:
    """What `compute_loss` is called with.

    Attributes:
        factor: what its loss counts in the mean over the window: 0 for a dummy batch.
        inputs: in place of those that it is handed.
        stream: of random numbers, which its forward draws from.
    """

    factor: float
    inputs: Any = None
    stream: Callable[[], AbstractContextManager[Any]] = nullcontext


class _AloneAccelerator:
    """An Accelerator as one process has it: losses that multiply by the number of processes do it for DDP's mean."""

    num_processes = 1

    def __init__(self, accelerator: object) -> None:
        vars(self)["_accelerator"] = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_accelerator"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_accelerator"], name, value)


def _is_row(name: str) -> bool:
    return name.endswith("logits") or name in ("hidden_states", "last_hidden_state")


def _put_together(model: nn.Module, output: object, lazy: bool) -> Any:
    """Full-length logits and hidden states in place of this rank's slices; everything else as it is."""
    if isinstance(output, Tensor):
        return full_output(output, model, lazy) if output.dim() == 3 else output
    if isinstance(output, MutableMapping):
        for name in [name for name in output if _is_row(name)]:
            output[name] = _put_together(model, output[name], lazy)
    elif type(output) is tuple:
        return tuple(_put_together(model, value, lazy) for value in output)
    return output


@contextmanager
def full_outputs(model: nn.Module, lazy: bool = True) -> Iterator[None]:
    """Inside, the model returns full-length logits [B, S, V] on every rank, with gradients.

    Every rank of the SP group then holds them, and what is computed from them is computed sp times over: the price of
    a function that wants to see all logits.

    Args:
        lazy: in training, gather hidden states and make logits where somebody looks at them.

    Collective: per forward one all-gather over the SP group; its backward is a reduce-scatter (sum).
    """
    if not is_prepared(model) or get_parallel_state(model).sp_size == 1:
        yield
        return
    base: Any = hf.base_model(model)  # which user code may call past its PEFT wrapper, and its backbone past both

    def put_together(module: nn.Module, args: object, output: object) -> Any:
        if module is base or current().call is None:
            return _put_together(model, output, lazy)
        return None

    parts = dict.fromkeys([base, base.base_model, hf.find_backbone(base)])
    handles = [part.register_forward_hook(put_together) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LossMixin(_Trainer):
    """Overrides of Trainer for the normalisation of the loss, whoever computes it."""

    _num_real: float = 0  # batches of the window that are no dummy batches, a data rank
    _micro_step = 0
    _window = 0  # micro-batches of it
    _most_real = 0  # batches of the window that are no dummy batches, on the data rank that has most
    _splits = False  # whether its last one, which has no partner, runs in two parts
    _partner: MicroBatch | None = None  # that waits for the next one
    _computes_loss = False
    _outputs_are_full = False
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
        looks = (own or self.compute_loss_func is not None) and is_prepared(self.model)
        try:
            with sharded_arithmetic(self.model) if looks else nullcontext():
                yield
        finally:
            self.accelerator, self._computes_loss = accelerator, outer

    def _items_a_batch(self, num_items: object, batches: float) -> Any:
        if num_items is None or batches == 1:
            return num_items
        exact = next(self.model.parameters()).dtype == torch.float64
        return torch.as_tensor(num_items).to(torch.float64 if exact else torch.float32) / batches

    @contextmanager
    def _averaging(self, batch: MicroBatch, beside: MicroBatch | None = None, parts: bool = False) -> Iterator[None]:
        """Around a `training_step`: what its loss counts in the mean over the window.

        Args:
            beside: runs at once with `batch`, before it in order, and its loss is added.
            parts: they are parts of one batch.

        What `compute_loss` returns is scaled already, so that a `training_step` of the user's own may do without what
        Trainer's does. A class that says `loss_is_scaled_for_ga` takes the mean over the window itself, and what is
        left is the one over the data ranks.
        """
        kept = {name: vars(self)[name] for name in ("compute_loss", "loss_is_scaled_for_ga") if name in vars(self)}
        compute_loss: Callable[..., Tensor] = self.compute_loss
        scaled = bool(self.loss_is_scaled_for_ga)
        own, real, ranks = overrides(self, "compute_loss"), self._num_real or 1, self.parallel_state.dp_size

        def averaged(
            model: nn.Module, inputs: object, return_outputs: bool = False, num_items_in_batch: object = None
        ) -> Any:
            items = self._items_a_batch(num_items_in_batch, ranks if scaled else ranks * real)

            def compute(one: MicroBatch) -> tuple[Tensor, list[Any]]:
                with one.stream(), nullcontext() if one.factor else counting_no_tokens():
                    given = inputs if one.inputs is None else one.inputs
                    found = compute_loss(model, given, return_outputs=return_outputs, num_items_in_batch=items)
                loss, *outputs = found if isinstance(found, tuple) else (found,)
                if isinstance(loss, DTensor):  # of nothing but parameters
                    loss = as_plain(loss)
                return (loss * one.factor if scaled else loss * one.factor / real), outputs

            self.current_gradient_accumulation_steps = real if scaled else 1
            # Around both of two sequences, of which either may end first.
            with self._as_one_process(own), self._full(model, self._wants_logits, lazy=False):
                if beside is None:
                    loss, outputs = compute(replace(batch, stream=nullcontext))  # it runs in that of its step
                else:
                    (first, _), (loss, outputs) = run_pair(compute, beside, batch, parts=parts)
                    loss = first + loss
            self.current_gradient_accumulation_steps = real
            return (loss, *outputs) if outputs else loss

        self.compute_loss, self.loss_is_scaled_for_ga = averaged, True
        try:
            yield
        finally:
            del self.compute_loss, self.loss_is_scaled_for_ga
            for name, value in kept.items():
                setattr(self, name, value)

    @contextmanager
    def _full(self, model: nn.Module, wanted: bool, lazy: bool = True) -> Iterator[None]:
        if not wanted or self._outputs_are_full:
            yield
            return
        self._outputs_are_full = True
        try:
            with full_outputs(model, lazy):
                yield
        finally:
            self._outputs_are_full = False

    @property
    def _wants_logits(self) -> bool:
        """Whether Trainer's `compute_loss` hands what the model returns to a function."""
        return self.compute_loss_func is not None or self.label_smoother is not None

    @override
    def compute_loss(
        self, model: nn.Module, inputs: object, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Any:
        if num_items_in_batch is None and self._computes_loss and not model.training:  # TRL's evaluation hands none
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        # `compute_loss_func` gets full logits and full labels. Every rank of the SP group computes the full loss from
        # them; the gather's backward sums the equal gradients, and FSDP's mean over the group takes the sum back.
        with self._full(model, self._wants_logits, lazy=False):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def _waits(self) -> bool:
        """Whether a micro-batch is run with the next one of the window, beside it and for the same log."""
        first, second = self._micro_step, self._micro_step + 1
        alike = (first <= self._most_real) == (second <= self._most_real)
        return self._overlaps and self._partner is None and first % 2 == 1 and second <= self._window and alike

    @property
    def _overlaps(self) -> bool:
        return self.args.plan.overlap == "pairs"

    def _can_split(self, batch: Any) -> bool:
        """Whether a batch has two parts whose losses add up to its own.

        Ours is a sum over targets divided by a number that both are handed. Of another one nobody can tell: it may be
        a mean, or have a term of its own.
        """
        if self._parts(batch) is None:
            return False
        own = self.compute_loss_func is not None or overrides(self, "compute_loss")
        if not own and has_chunked_loss(self.model):
            return True
        if self.is_world_process_zero():
            logger.warning_once(
                "`overlap` ('pairs') has no effect on a micro-batch without a partner: it is not split in two, since "
                "the loss is not the one that `prepare_omni` sets, and losses of halves may not add up to that of the "
                "batch. Make `gradient_accumulation_steps` an even number, so that each micro-batch has a partner."
            )
        return False

    def _parts(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        return split_batch(batch, hf.text_config(hf.base_model(self.model)).hidden_size)
