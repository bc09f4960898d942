"""Loss, evaluation and prediction under a plan: what a user's function sees is what one rank would hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.utils.operations import find_batch_size, recursively_apply
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from hf_veomni.expert import counting_no_tokens
from hf_veomni.fsdp import as_plain, check_dtype_can_change, held_weights
from hf_veomni.hf.require import override
from hf_veomni.loss import chunked_evaluation, has_chunked_loss
from hf_veomni.mesh import ParallelState, is_prepared
from hf_veomni.trainer.facts import InStep
from hf_veomni.trainer.loaders import DummyBatch
from hf_veomni.trainer.losses import overrides

if TYPE_CHECKING:
    from hf_veomni.trainer.loop import BatchingMixin as _Trainer
else:
    _Trainer = object

# Methods in which code of the user may look at what the model returns.
_LOOK_AT_OUTPUTS = ("compute_loss", "training_step", "prediction_step")


class EvaluationMixin(_Trainer):
    """Overrides of Trainer around `compute_loss` and `prediction_step`.

    Evaluation runs under SP. Loss: the mean over the label tokens of all batches. Logits: gathered over the SP group
    before `preprocess_logits_for_metrics`, then over the data ranks, in dataset order and without dummy batches. When
    nobody looks at logits, none are made.
    """

    _evaluates_stream = False
    # Of the batches evaluated so far, and the items in each; None outside of `evaluation_loop`.
    _eval_losses: list[tuple[Tensor, Tensor | None]] | None = None

    @override
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        with self._full(self.model, overrides(self, *_LOOK_AT_OUTPUTS)):
            super()._run_epoch(*args, **kwargs)

    @override
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # Steps a second are those of a data rank; the rest of the view is this process.
        with self._counting_data_ranks(self.args.process_index):
            return super().evaluate(*args, **kwargs)

    @override
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._counting_data_ranks(self.args.process_index):
            return super().predict(*args, **kwargs)

    @override
    def evaluation_loop(self, dataloader: object, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, in step on all ranks, whatever the loader.

        The loss is the mean over all items (label tokens) where the trainer divides by their number, so that it is
        the same under every plan and batch size; Trainer gives the mean over the batches.

        Raises:
            ValueError: as `get_batch_samples` does; on every rank.
        """
        state: ParallelState = self.parallel_state
        loader: Any = dataloader
        if state.world_size > 1:
            loader = InStep(dataloader, state, self.args.device, self._notes, self._hear_while_evaluating)
        self._evaluates_stream = not has_length(getattr(dataloader, "dataset", None))
        self._eval_losses = []
        if state.world_size > 1 and self.args.bf16_full_eval and not self.is_in_train:
            check_dtype_can_change(self.model, torch.bfloat16)
        with self._full(self.model, overrides(self, *_LOOK_AT_OUTPUTS)):
            output: Any = super().evaluation_loop(loader, *args, **kwargs)
        name, loss = f"{kwargs.get('metric_key_prefix', 'eval')}_loss", self._loss_of_all_items()
        # What a `prediction_step` of the user's own returns is averaged by Trainer, as it is.
        if loss is not None and name in output.metrics and not overrides(self, "prediction_step"):
            output.metrics[name] = loss
        # Of a stream Trainer counts what this rank has read.
        counted = self._evaluates_stream and isinstance(loader, InStep)
        return output._replace(num_samples=loader.num_rows) if counted else output

    @override
    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if self.parallel_state.world_size > 1 or self._evaluates_stream:
            self.gather_function = partial(self._gather_results, inputs)
        chunked = prediction_loss_only and self.compute_loss_func is None and self.label_smoother is None
        chunked = chunked and is_prepared(model) and has_chunked_loss(model)
        own = overrides(self, *_LOOK_AT_OUTPUTS)
        with self._as_one_process(own), self._accumulating_nothing(), ExitStack() as stack:
            if isinstance(inputs, DummyBatch):
                stack.enter_context(counting_no_tokens())
            if chunked:
                stack.enter_context(chunked_evaluation(model))
                stack.enter_context(held_weights(model) if own else nullcontext())
            else:
                stack.enter_context(self._full(model, not prediction_loss_only))
            found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        found = (as_plain(found[0]), *found[1:])
        if self._eval_losses is not None and found[0] is not None and not isinstance(inputs, DummyBatch):
            # `predict_with_generate` takes the model's loss as it is, a mean over the same items.
            counted = self._counted or getattr(self.args, "predict_with_generate", False)
            items: Any = self._get_num_items_in_batch([inputs], self.args.device) if counted else None
            self._eval_losses.append((found[0], items))
        return found

    @contextmanager
    def _accumulating_nothing(self) -> Iterator[None]:
        """TRL divides a loss that was given a number of items by what the last window of training has left here."""
        name = "current_gradient_accumulation_steps"
        before = vars(self).get(name)
        setattr(self, name, 1)
        try:
            yield
        finally:
            if before is None:
                delattr(self, name)
            else:
                setattr(self, name, before)

    def _loss_of_all_items(self) -> float | None:
        """The mean over all items that were evaluated; None where a loss was divided by no number of items.

        Collective: one all-reduce of four numbers over all ranks.
        """
        totals = torch.zeros(4, dtype=torch.float64)  # loss and items of the finite batches and of the others
        for loss, items in self._eval_losses or ():
            count = float("nan") if items is None else float(items)
            if count != 0:  # of no items there is no mean
                totals[[0, 1] if bool(loss.isfinite()) else [2, 3]] += torch.tensor([float(loss) * count, count])
        self._eval_losses = None
        if self.parallel_state.world_size > 1:
            totals = totals.to(self.args.device)
            dist.all_reduce(totals)
        if totals[[1, 3]].isnan().any() or not totals[[1, 3]].any():
            return None
        kept = totals[:2] if self.args.logging_nan_inf_filter and totals[1] else totals[:2] + totals[2:]
        return float(kept[0] / kept[1])

    def _gather_results(self, inputs: object, data: object) -> Any:
        """Over the data ranks. A dummy batch gives no rows; of a stream, whose end accelerate does not know, a short
        batch gives as many entries as it has rows, its loss included."""
        rows = find_batch_size(inputs) if self._evaluates_stream else None
        if isinstance(inputs, DummyBatch) or rows is not None:
            kept = 0 if isinstance(inputs, DummyBatch) else rows
            data = recursively_apply(lambda entries: entries[:kept], data)
        return self.accelerator.gather_for_metrics(data)
