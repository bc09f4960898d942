"""Hooks at the top of a model that is a pipeline stage: what its calls may say, and what they return.

Within `run_window` a call is one micro-batch of the schedule. Without gradients any call is a pipeline of one
micro-batch: the last stage's loss and logits are handed to all stages, so that evaluation needs nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from hf_veomni import hf
from hf_veomni.context import current, enter, is_generating, leave, within
from hf_veomni.errors import UnsupportedError
from hf_veomni.loss import LazyLogits, has_chunked_loss
from hf_veomni.mesh import ParallelState
from hf_veomni.pipeline.link import Link
from hf_veomni.pipeline.microbatch import MicroBatch
from hf_veomni.pipeline.stage import CHUNKS

_TARGETS = ("labels", "shift_labels", "num_items_in_batch")
# name -> the value that stages go with besides None, why no other, and what to do.
_REFUSED = {
    "output_hidden_states": (False, "a stage has those of its own layers alone", "Leave it out"),
    "output_attentions": (False, "a stage has those of its own layers alone", "Leave it out"),
    "return_dict": (True, "stages share loss and logits by their names", "Leave it out"),
    "inputs_embeds": (None, "the first stage makes them", "Give `input_ids`"),
}


class _Border:
    def __init__(self, model: nn.Module, state: ParallelState, encoded: Sequence[str]) -> None:
        self.state, self.encoded = state, encoded
        self.names = list(inspect.signature(model.forward).parameters)
        self._inputs: dict[str, Any] = {}  # of a call outside of a window
        self._stack = ExitStack()

    def enter(self, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a forward. Raises UnsupportedError for calls that one stage cannot answer."""
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self._check(model, inputs)
        if current().stage is None:
            if torch.is_grad_enabled():
                raise UnsupportedError(
                    f"A call of {type(model).__name__.removeprefix('FSDP')} with gradients is one micro-batch of a "
                    f"pipeline (`pp_size` is {self.state.plan.pp_size}), whose backward other stages begin: hand the "
                    "window's batches to `run_window(model, batches)`, or call the model under torch.no_grad()."
                )
            enter(self, stage=MicroBatch(Link(self.state)))
            self._inputs = inputs
            if (chunks := getattr(model, CHUNKS, None)) is not None:
                self._stack.enter_context(chunks.running(0))
        stage: MicroBatch = current().stage
        if not stage.is_first:
            inputs = {name: value for name, value in inputs.items() if name not in self.encoded}
        if not stage.is_last:
            inputs = {name: value for name, value in inputs.items() if name not in _TARGETS}
        return (), inputs

    def _check(self, model: Any, inputs: dict[str, Any]) -> None:
        kind = type(model).__name__.removeprefix("FSDP")
        if is_generating(model) or hf.uses_cache(inputs):
            raise UnsupportedError(
                f"{kind} has no `generate` and takes no cache with `pp_size` {self.state.plan.pp_size}: save the "
                "model, which opens in plain transformers, and generate with that."
            )
        for name, (taken, reason, way) in _REFUSED.items():
            asked, origin = inputs.get(name), ""
            if asked is None and taken is not None:
                asked, origin = getattr(model.config, name, None), ", from the config"
                way = f"Set `model.config.{name}` to {taken}"
            if asked is not None and asked is not taken:
                shown = f"a tensor {tuple(asked.shape)}" if isinstance(asked, Tensor) else repr(asked)
                raise UnsupportedError(
                    f"`{name}` ({shown}{origin}) cannot be combined with `pp_size` ({self.state.plan.pp_size}): "
                    f"{reason}. {way}, or use pp_size=1."
                )

    def leave(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """After a forward without gradients outside of a window: the answer of the last stage, on all of them."""
        stage = current().stage
        leave(self)
        if current().stage is stage:  # within a window
            # Nothing but the last stage's loss is read. FSDP2 would gather for what else has a graph (features of
            # images), on the ranks alone whose rows have some.
            hands_out = stage is None or stage.is_last or not isinstance(output, ModelOutput)
            return None if hands_out else type(output)()
        self._stack.close()
        inputs, self._inputs = self._inputs, {}
        if not isinstance(output, ModelOutput):
            return None  # an error is on its way
        sent = [stage]
        stage.send()
        chunks: Any = getattr(model, CHUNKS, None)  # there with more than one
        for chunk in range(1, self.state.plan.pp_stages):
            sent.append(MicroBatch(Link(self.state, chunk)))
            with chunks.running(chunk), within(stage=sent[-1]):
                output = model(**inputs)
            sent[-1].send()
        for batch in sent:
            batch.link.finish()
        return _share_answer(output, self.state)


def _share_answer(output: ModelOutput, state: ParallelState) -> ModelOutput:
    """Loss and logits of the last stage. Collectives: broadcasts over the stages, of names and of each tensor."""
    source, last = state.plan.pp_size - 1, state.pp_rank == state.plan.pp_size - 1
    values: dict[str, Tensor] = {}
    if last:
        values = {k: v for k, v in output.items() if isinstance(v, Tensor) and not isinstance(v, LazyLogits)}
    facts: list[Any] = [[(name, tuple(value.shape), value.dtype) for name, value in values.items()]]
    dist.broadcast_object_list(facts, group=state.pp_group, group_src=source, device=state.device)
    for name, shape, dtype in facts[0]:
        value = values[name].contiguous() if last else torch.empty(shape, dtype=dtype, device=state.device)
        dist.broadcast(value, group=state.pp_group, group_src=source)
        values[name] = value
    if last:
        return output
    kind: Any = type(output)
    return kind(**values)


def attach_border(model: Any, state: ParallelState, encoded: Sequence[str] = ()) -> Callable[[], None]:
    """Install the hooks, before all others, on a model that has its loss from this package.

    Args:
        encoded: names of arguments that only the first stage is called with.

    Returns:
        A function that takes them off.

    Raises:
        UnsupportedError: the model computes its loss itself.
    """
    if not has_chunked_loss(model):
        raise UnsupportedError(
            f"{type(model).__name__} computes its loss itself, and with `pp_size` {state.plan.pp_size} it must be the "
            "mean over the targets of all micro-batches: use pp_size=1."
        )
    border = _Border(model, state, encoded)
    handles = [
        model.register_forward_pre_hook(border.enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(border.leave, prepend=True, always_call=True),
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
