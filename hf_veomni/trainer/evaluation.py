"""Loss, evaluation and prediction under a plan: what a user's function sees is what one rank would hold."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from accelerate.utils.operations import find_batch_size, recursively_apply
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from hf_veomni.loss import has_lean_loss, lean_evaluation
from hf_veomni.mesh import ParallelState, get_parallel_state
from hf_veomni.prepare import gather_sequence
from hf_veomni.trainer.adapt import is_prepared
from hf_veomni.trainer.loaders import Filler
from hf_veomni.trainer.trl import is_trl
from hf_veomni.trainer.windows import InStep

_Trainer: Any = object


def _gather_outputs(model: nn.Module, output: Any) -> Any:
    """Full-length logits and hidden states in place of this rank's slices; everything else as it is."""
    if not isinstance(output, MutableMapping) or not isinstance(output.get("logits"), Tensor):
        return output
    local = output["logits"].shape[1]
    for name in [name for name in output if name.endswith("logits") and isinstance(output[name], Tensor)]:
        if output[name].dim() == 3 and output[name].shape[1] == local:  # of all heads that a model has
            output[name] = gather_sequence(output[name], model)
    hidden = output.get("hidden_states")
    if isinstance(hidden, tuple):
        output["hidden_states"] = tuple(gather_sequence(h, model) if h.shape[1] == local else h for h in hidden)
    return output


@contextmanager
def whole_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns full-length logits [B, S, V] on every rank, with gradients.

    Every rank of the SP group then holds them, and what is computed from them is computed sp times over: the price of
    a function that wants to see all logits.

    Collective: per forward one all-gather over the SP group; its backward is a reduce-scatter (sum).
    """
    if not is_prepared(model) or get_parallel_state(model).sp_size == 1:
        yield
        return
    handle = model.register_forward_hook(lambda module, args, output: _gather_outputs(model, output))
    try:
        yield
    finally:
        handle.remove()


class EvaluationMixin(_Trainer):
    """Overrides of Trainer around `compute_loss` and `prediction_step`.

    Evaluation runs under SP. Loss: each batch by its own tokens, as in one process. Logits: gathered over the SP group
    before `preprocess_logits_for_metrics`, then over the data ranks, in dataset order and without fillers. When nobody
    looks at logits, none are made.
    """

    _outputs_are_whole = False
    _evaluates_stream = False

    @contextmanager
    def _whole(self, model: nn.Module, wanted: bool) -> Iterator[None]:
        if not wanted or self._outputs_are_whole:
            yield
            return
        self._outputs_are_whole = True
        try:
            with whole_outputs(model):
                yield
        finally:
            self._outputs_are_whole = False

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # Steps a second are those of a data rank; the rest of the view is this process.
        with self._counting_data_ranks(self.args.process_index):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._counting_data_ranks(self.args.process_index):
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, in step on all ranks, whatever the loader.

        Raises:
            ValueError: as `get_batch_samples` does; on every rank.
        """
        state: ParallelState = self.parallel_state
        self._evaluates_stream = not has_length(getattr(dataloader, "dataset", None))
        if state.world_size == 1:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        loader = InStep(dataloader, state, self.args.device)
        output = super().evaluation_loop(loader, *args, **kwargs)
        # Of a stream Trainer counts what this rank has read.
        return output._replace(num_samples=loader.num_rows) if self._evaluates_stream else output

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # `compute_loss_func` gets full logits and full labels. Every rank of the SP group computes the whole loss from
        # them; the gather's backward sums the equal gradients, and FSDP's mean over the group takes the sum back.
        whole = self.compute_loss_func is not None or (self.label_smoother is not None and is_trl(self))
        with self._whole(model, whole):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if self.parallel_state.world_size > 1 or self._evaluates_stream:
            self.gather_function = partial(self._gather_results, inputs)
        lean = prediction_loss_only and self.compute_loss_func is None and self.label_smoother is None
        lean = lean and is_prepared(model) and has_lean_loss(model)
        self._evaluating = True
        try:
            with ExitStack() as stack:
                if lean:
                    stack.enter_context(lean_evaluation(model))
                else:
                    stack.enter_context(self._whole(model, not prediction_loss_only))
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._evaluating = False

    def _gather_results(self, inputs: Any, data: Any) -> Any:
        """Over the data ranks. A filler gives no rows; of a stream, whose end accelerate does not know, a short batch
        gives as many entries as it has rows, its loss included."""
        rows = find_batch_size(inputs) if self._evaluates_stream else None
        if isinstance(inputs, Filler) or rows is not None:
            kept = 0 if isinstance(inputs, Filler) else rows
            data = recursively_apply(lambda entries: entries[:kept], data)
        return self.accelerator.gather_for_metrics(data)
