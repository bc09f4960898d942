"""Install the loss on an unmodified transformers causal LM, and take it off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_veomni import hf
from hf_veomni.comm.gather import gather_shards
from hf_veomni.errors import UnsupportedError
from hf_veomni.loss.chunked import full_precision, summed_loss
from hf_veomni.loss.head import record_head_call
from hf_veomni.loss.lazy_logits import LazyLogits, Recipe
from hf_veomni.loss.targets import Count, sum_over_sequence, targets_and_count


@dataclass
class _State:
    """Shared by the loss and the head of one model; a deep copy of the model gets its own, with the same group."""

    sp_group: dist.ProcessGroup | None
    chunk_tokens: int | None
    label_smoothing: float = 0.0
    evaluating: bool = False
    attached: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        memo[id(self)] = copied = replace(self)
        return copied


class CausalLMLoss:
    """The loss that `model.loss_function` becomes: next-token cross entropy of full rows, from this rank's logits.

    Set `label_smoothing` (0 to 1) to get what transformers' `LabelSmoother` computes, without the full logits.
    """

    def __init__(self, state: _State) -> None:
        self._state = state

    @property
    def label_smoothing(self) -> float:
        """Share of the loss that is the mean over all tokens of the vocabulary, 0 to 1."""
        return self._state.label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`label_smoothing` ({value}) must be between 0 and 1.")
        self._state.label_smoothing = float(value)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Count | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Token losses of the full rows, summed and divided by `num_items_in_batch` or by the number of targets.

        Args:
            logits: this rank's part [B, s, V], or lazy logits in place of it; also full rows [B, S, V] beside
                `labels`.
            labels: full rows [B, S], not shifted, the same on all ranks of the SP group.
            vocab_size: ignored; V is the last dimension of the logits.
            num_items_in_batch: targets over which the caller averages; None means the valid targets of these rows.
            shift_labels: targets already shifted, full rows [B, S] or this rank's part [B, s]; replaces `labels`.

        Returns:
            Scalar, the same on all ranks of the SP group; fp32, or fp64 for fp64 logits. Without any valid target it
            is what stock transformers gives: nan, or 0 if `num_items_in_batch` is given.

        Collective: one all-reduce of a scalar over the SP group. The backward has none, and multiplies by sp, so that
        gradients averaged over the SP group are those of one rank with the full rows.

        Raises:
            ValueError: targets whose shape does not fit the logits.
        """
        group, shape, device = self._state.sp_group, logits.shape, logits.device
        labels = None if labels is None else labels.to(device)
        shift_labels = None if shift_labels is None else shift_labels.to(device)
        if shift_labels is None and labels is not None and labels.shape[-1] == shape[-2] > 1:
            group = None  # full rows: every rank computes the loss of all of them
        targets, divisor = targets_and_count(labels, shift_labels, num_items_in_batch, shape[-2], group, ignore_index)
        if targets.numel() != shape[:-1].numel():
            raise ValueError(
                f"Targets of shape {tuple(targets.shape)} must match logits of shape {tuple(shape)} in all but the "
                "vocabulary: pass labels with one class index for each input token."
            )
        total = self._sum(logits, targets, ignore_index)
        if isinstance(divisor, Tensor):
            divisor = divisor.to(total.device)
        return sum_over_sequence(total / divisor, group)

    def _sum(self, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        smoothing = self._state.label_smoothing
        if not isinstance(logits, LazyLogits) or logits.recipe.real is not None:
            scores = logits.to(full_precision(logits.dtype)).flatten(0, -2)
            return F.cross_entropy(
                scores, targets.flatten(), ignore_index=ignore_index, reduction="sum", label_smoothing=smoothing
            )
        total = summed_loss(logits.recipe, targets, ignore_index, smoothing)  # type: ignore[call-issue]
        if total.requires_grad:
            total.register_hook(logits.recipe.call.before_backward)
        return total


class FullSequenceLoss:
    """A loss that somebody has set on a prepared model, which gets the logits of full rows [B, S, V] on every rank.

    Collective: one all-gather of hidden states over the SP group; its backward is a reduce-scatter (sum).
    """

    def __init__(self, loss: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self.loss, self.group = loss, group

    def __call__(self, logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = labels if labels is not None else kwargs.get("shift_labels")
        if given is None or not 0 <= logits.shape[1] * dist.get_world_size(self.group) - given.shape[1] < (
            dist.get_world_size(self.group)
        ):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(
                f"`labels` {shape} of the loss that was set on this model must be those of its full rows, of which "
                f"this rank has logits {tuple(logits.shape)}: pass labels as long as the rows."
            )
        length = given.shape[1]

        def full(x: Tensor) -> Tensor:
            return gather_shards(x, self.group, dim=1).narrow(1, 0, length)

        logits = logits.of_tokens(full) if isinstance(logits, LazyLogits) else full(logits)
        return self.loss(logits, labels, *args, **kwargs)


def _take_loss(state: _State, model: PreTrainedModel, args: object) -> None:
    """Before a forward: a loss that came after ours knows no slices."""
    current = model.loss_function
    if state.attached and state.sp_group is not None and not isinstance(current, (CausalLMLoss, FullSequenceLoss)):
        model.loss_function = FullSequenceLoss(current, state.sp_group)


class _HeadForward:
    """Forward of the output head: lazy logits where only the loss will want the logits, else the original."""

    def __init__(
        self, model: nn.Module, head: nn.Module, original: Callable[..., Tensor], state: _State, own: Any
    ) -> None:
        """`own`: the `forward` that the head had as an attribute of its own, or None."""
        self.model, self.head, self.original, self.state, self.own = model, head, original, state, own

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        wanted = self.model.training if torch.is_grad_enabled() else self.state.evaluating
        if self.state.attached and (wanted or self.state.evaluating) and len(args) == 1 and not kwargs:
            sharded = isinstance(self.model, FSDPModule)
            call = record_head_call(self.head, self.original, args[0], sharded, self.state.chunk_tokens)
            if call is not None:
                return LazyLogits.make(Recipe(call, call.dtype))
        return self.original(*args, **kwargs)

    def restore(self) -> None:
        if vars(self.head).get("forward") is not self:
            return  # wrapped by somebody since; detached, it only passes on
        if self.own is None:
            del self.head.forward
        else:
            self.head.forward = self.own


def attach_chunked_loss(
    model: nn.Module,
    sp_group: dist.ProcessGroup | None = None,
    *,
    chunked: bool = True,
    chunk_tokens: int | None = None,
    label_smoothing: float = 0.0,
) -> Callable[[], None]:
    """Replace the loss of a causal LM by one that knows sequence shards, and its head by one that computes no logits.

    In training, with gradients, the head returns `LazyLogits`; in evaluation, without gradients and in
    generation, real logits (see `chunked_evaluation`).

    Args:
        model: a transformers model whose forward calls `self.loss_function` for a causal LM, or a `PeftModel` on one.
        sp_group: ranks that share the rows, in the order of their shards; None for full rows.
        chunked: False keeps the full local logits and replaces only the loss.
        chunk_tokens: tokens whose logits are held at once; by default `default_chunk_tokens`.
        label_smoothing: see `CausalLMLoss.label_smoothing`.

    Returns:
        A function that puts everything back.

    Raises:
        UnsupportedError: the model computes its loss itself, its loss is not the causal LM loss (another type, or one
            that was set by hand), or it has no output head.
    """
    base = hf.base_model(model)
    head = _checked_head(base)
    state = _State(sp_group, chunk_tokens)
    loss = CausalLMLoss(state)
    loss.label_smoothing = label_smoothing
    own = hf.replace_loss(base, loss)
    handle = base.register_forward_pre_hook(partial(_take_loss, state))
    return partial(_detach, base, state, loss, own, _replace_head(base, head, state, chunked), handle)


def _detach(
    model: PreTrainedModel, state: _State, loss: CausalLMLoss, own: Any, head: _HeadForward | None, handle: Any
) -> None:
    """Put loss and head back. A plain function of its model, so that a deep copy's `partial` works on the copy."""
    if not state.attached:
        return
    state.attached = False
    handle.remove()
    if isinstance(model.loss_function, FullSequenceLoss):
        model.loss_function = model.loss_function.loss
    hf.restore_loss(model, loss, own)
    if head is not None:
        head.restore()


def has_chunked_loss(model: nn.Module) -> bool:
    """Whether `attach_chunked_loss` is in force on `model`; families with a loss of their own keep it."""
    return isinstance(hf.loss_set_on(hf.base_model(model)), CausalLMLoss)


@contextmanager
def chunked_evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context the attached head returns lazy logits in evaluation too: for when only the loss is wanted.

    Raises:
        ValueError: no loss is attached to `model`.
    """
    loss = hf.loss_set_on(hf.base_model(model))
    if not isinstance(loss, CausalLMLoss):
        raise ValueError(f"{type(model).__name__} has no loss attached: call `attach_chunked_loss(model)` first.")
    previous, loss._state.evaluating = loss._state.evaluating, True
    try:
        yield
    finally:
        loss._state.evaluating = previous


def _checked_head(model: PreTrainedModel) -> nn.Module:
    name = type(model).__name__
    if not _calls_loss_function(type(model)):
        raise UnsupportedError(
            f"{name} computes its loss inside its forward instead of calling `self.loss_function`, so it cannot be "
            "replaced: use a model that does, or compute the loss from the logits yourself."
        )
    current = model.loss_function
    if isinstance(current, CausalLMLoss):
        raise UnsupportedError(f"{name} has this loss attached already: detach it first.")
    if current is not ForCausalLMLoss:
        raise UnsupportedError(
            f"{name} has the loss {getattr(current, '__name__', type(current).__name__)!r} (loss_type "
            f"{getattr(model, 'loss_type', None)!r}), and only 'ForCausalLMLoss' can be replaced: leave "
            "`model.loss_function` as the library sets it, or keep your own loss and sp_size=1."
        )
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedError(f"{name} has no output head (`get_output_embeddings()` is None): use a causal LM.")
    try:
        inspect.signature(head.forward).bind("hidden states")
    except TypeError as error:
        raise UnsupportedError(
            f"The output head of {name} ({type(head).__name__}) must take the hidden states alone: {error}. Use "
            "chunked_loss=False."
        ) from error
    return head


def _calls_loss_function(model_class: type[nn.Module]) -> bool:
    """Whether the class's forward, or the inherited one that it calls, uses `self.loss_function`."""
    for owner in model_class.__mro__:
        if "forward" in vars(owner):
            names = inspect.unwrap(vars(owner)["forward"]).__code__.co_names
            if "loss_function" in names:
                return True
            if "super" not in names:
                return False
    return False


def _replace_head(model: PreTrainedModel, head: nn.Module, state: _State, chunked: bool) -> _HeadForward | None:
    if not chunked:
        return None
    replacement = _HeadForward(model, head, head.forward, state, vars(head).get("forward"))
    head.forward = replacement  # type: ignore[method-assign]
    return replacement
