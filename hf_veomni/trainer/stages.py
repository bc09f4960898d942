"""Training steps of a pipeline: Trainer hands out micro-batches one by one, and stages want a window of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import counting_no_tokens
from hf_veomni.pipeline import run_window
from hf_veomni.sequence.randomness import own_stream
from hf_veomni.trainer.loaders import DummyBatch
from hf_veomni.trainer.losses import LossMixin, overrides
from hf_veomni.trainer.trl import is_trl

_OWN = ("compute_loss", "training_step", "prediction_step")


class StagesMixin(LossMixin):
    """Keeps the micro-batches of a step, and runs all of them with the last one."""

    _kept: list[Any]  # of the micro-batches of a step

    def _check_stages(self) -> None:
        """Raises UnsupportedError for what looks at a loss or at logits on every rank, which the last stage has."""
        plan = self.args.plan
        if plan.pp_size == 1:
            return
        own = next((name for name in _OWN if overrides(self, name)), None)
        reason = None
        if is_trl(self):
            reason = f"{type(self).__name__} is a trainer of TRL, which computes losses of its own"
        elif own is not None:
            reason = f"{type(self).__name__} has a `{own}` of its own, and the last stage alone has logits"
        elif self.compute_loss_func is not None:
            reason = "`compute_loss_func` is given, and the last stage alone has logits"
        if reason is not None:
            raise UnsupportedError(f"`pp_size` ({plan.pp_size}): {reason}. Use pp_size=1, or the model's own loss.")

    def _step_of_stages(self, model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """The loss of the whole step with its last micro-batch, zero before: what Trainer adds up for its log."""
        if self._micro_step == 1:
            self._kept = []
        self._kept.append(inputs)
        if self._micro_step < self._window:
            return torch.zeros((), device=self.args.device)
        batches: list[Any] = [self._prepare_inputs(batch) for batch in self._kept]
        dummies = [isinstance(batch, DummyBatch) for batch in self._kept]
        self._kept = []
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        state = self.parallel_state
        items = self._items_a_batch(num_items, state.dp_size) if state.dp_size > 1 else num_items
        # Without a number of items each loss is the mean of its micro-batch, and the step's is the mean of these.
        share = 1.0 if num_items is not None else 1.0 / (self._num_real or 1)
        emptied = self.args.torch_empty_cache_steps
        empties = emptied is not None and self.state.global_step % emptied == 0
        place = (state.pp_rank * state.dp_size + state.dp_rank) * state.sp_size + state.sp_rank

        def compute(index: int) -> Tensor | None:
            chunk = getattr(current().stage, "chunk", 0)
            key = self.args.device, self.args.seed, self.state.global_step, index + 1, place
            stream = own_stream(*key, *([chunk] if chunk else []))
            counting = counting_no_tokens() if dummies[index] else nullcontext()
            with stream, counting, self.compute_loss_context_manager():
                loss = getattr(model(**batches[index], num_items_in_batch=items), "loss", None)
            if empties:
                clear_device_cache()  # where Trainer does it: between forward and backward
            return None if loss is None else loss * (0.0 if dummies[index] else share)

        return run_window(model, batches, compute_loss=compute)
