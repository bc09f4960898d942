"""The load-balancing (auxiliary) loss of a router over the tokens of all ranks.

Shapes: E experts, K for each token, t tokens of this rank, N tokens of all ranks; each counted once for each layer.

    loss = E * sum over experts of (share of the tokens that chose it) * (its mean probability)

is no mean over tokens, so the losses of ranks do not average to that of the batch. Both factors are sums over tokens
divided by N, and the sums are what the ranks exchange. The families of transformers share one function for it,
`load_balancing_loss_func(router_logits, E, K, attention_mask)`, which is replaced in their modules while a prepared
model runs its forward; every other model gets the stock one.

Under gradient accumulation a step's loss is that of its micro-batches, weighed by their share of the step's targets
(`num_items_in_batch`), as the cross entropy is. The stock Trainer adds it up over micro-batches and ranks instead.

Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6; transformers 5.23, models/mixtral/modeling_mixtral.py.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hf_veomni.context import current, enter, leave
from hf_veomni.expert.dispatch import count_pairs
from hf_veomni.mesh import ParallelState
from hf_veomni.pairs import Visit

_NAME = "load_balancing_loss_func"
# What of a model's inputs tells which tokens count, and for how much.
_READ = ("input_ids", "inputs_embeds", "attention_mask", "labels", "shift_labels", "num_items_in_batch")


class _OfAllRanks(torch.autograd.Function):
    """(sum of probabilities [E] of this rank, value, slope [E]) -> value; the gradient of the sum is slope."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


@dataclass(frozen=True, eq=False)
class _LossOfAllRanks:
    """What `load_balancing_loss_func` is during one forward of a prepared model.

    Attributes:
        inputs: of the model, those in `_READ`.
        training: whether gradients are enabled.
    """

    state: ParallelState
    inputs: Mapping[str, Any]
    training: bool

    def __call__(
        self, gate_logits: object, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Tensor | int:
        """The loss of all ranks' tokens, times this micro-batch's share of the step.

        Collective: one all-reduce of 2 E + 2 numbers over all ranks, or over the SP group without gradients; in a
        pipeline over the ranks of its last stage, to which the sums of the others come. The backward has none:
        gradients are those of the sum of all ranks' losses, which FSDP averages.
        """
        sums = None
        if isinstance(gate_logits, tuple) and gate_logits:
            assert num_experts is not None
            sums = _sums(gate_logits, num_experts, top_k, self._valid(len(gate_logits[0])))
        if (stage := current().stage) is not None:
            sums = stage.add_router_sums(sums)
        if sums is None:
            return 0
        share = torch.as_tensor(self._share(sums[0].device), dtype=torch.float64)
        chosen, probabilities, tokens = sums
        args = chosen, probabilities, tokens, share.to(sums[0].device, non_blocking=True)
        flight = current().flight
        if flight is None or not flight.parts:
            return self._loss(*args)
        return flight.meet(self.state, Visit(args), self._of_both, self._loss)

    def _of_both(self, first: Visit, second: Visit) -> tuple[Tensor, Tensor]:
        """The loss of a batch that runs in two parts, and zero: its factors are sums over both."""
        sums = [one + other for one, other in zip(first.args, second.args, strict=True)]
        return self._loss(*sums), torch.zeros_like(sums[1][0])

    def _loss(self, chosen: Tensor, probabilities: Tensor, count: Tensor, weight: Tensor) -> Tensor:
        num_experts = len(chosen)
        both = torch.cat([chosen.double(), probabilities.detach().double(), count.double()[None], weight[None]])
        both = both * (not current().idle)
        self._reduce(both)
        chosen_all, probable_all = both[:num_experts], both[num_experts : 2 * num_experts]
        total, weights = both[-2].clamp(min=1), both[-1]  # 0 where no rank has a token that counts
        value = num_experts * (chosen_all * probable_all).sum() / total**2
        slope = num_experts * chosen_all / total**2 * weights
        return _OfAllRanks.apply(
            probabilities, (value * weight).to(probabilities.dtype), slope.to(probabilities.dtype)
        )

    def _reduce(self, both: Tensor) -> None:
        """Without gradients a batch has a loss of its own, as in one process: its tokens are those of the SP group."""
        if self.training and self.state.world_size > 1:
            dist.all_reduce(both, group=self.state.stage_group)
        elif self.state.sp_size > 1:
            dist.all_reduce(both, group=self.state.sp_group)

    def _share(self, device: torch.device) -> Tensor | float:
        items, labels = self.inputs.get("num_items_in_batch"), self.inputs.get("labels")
        shifted = self.inputs.get("shift_labels")
        if items is None or (labels is None and shifted is None):
            return 1.0
        targets = shifted if labels is None or shifted is not None else F.pad(labels, (0, 1), value=-100)[..., 1:]
        count = (targets != -100).sum().to(device)  # where the ranks can add it up
        if shifted is not None and shifted.shape[1] < self._length():
            dist.all_reduce(count, group=self.state.sp_group)
        return count / items

    def _given(self) -> Tensor:
        embeds = self.inputs.get("inputs_embeds")
        return self.inputs["input_ids"] if embeds is None else embeds

    def _length(self) -> int:
        return self._given().shape[1]

    def _valid(self, local: int) -> Tensor | None:
        """[t] which of this rank's tokens count: none that is padding, of the caller or of a row's last shard."""
        rows, length = self._given().shape[:2]
        mask = self.inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        sp, full = self.state.sp_size, local == rows * length
        if mask is None and (full or length % sp == 0):
            return None
        if mask is None:
            mask = self._given().new_ones((rows, length), dtype=torch.bool)
        mask = mask[:, -length:].bool()
        if not full:
            part = -(-length // sp)
            mask = F.pad(mask, (0, part * sp - length))[:, self.state.sp_rank * part :][:, :part]
        return mask.reshape(-1)


class RouterLoss:
    """Has the functions of one prepared model's family compute its load-balancing loss over all ranks' tokens."""

    def __init__(self, model: nn.Module, state: ParallelState, module: str) -> None:
        """Install on `model`, whose family keeps its function in `module`."""
        self.state, self.module = state, module
        self._signature = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True, prepend=True),  # last in, first out
        ]
        _patches.add(self)

    def detach(self) -> None:
        """Remove the hooks, and the function after the last model of its family."""
        for handle in self._handles:
            handle.remove()
        _patches.remove(self)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        _patches.add(self)  # a deep copy of the model comes here first
        inputs = {**dict(zip(self._signature, args, strict=False)), **kwargs}
        inputs = {name: inputs.get(name) for name in _READ}
        enter(self, router_loss=_LossOfAllRanks(self.state, inputs, torch.is_grad_enabled()))

    def _leave(self, model: nn.Module, args: tuple, output: object) -> None:
        leave(self)


def _sums(
    gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choices [E], probabilities [E] and count of this rank's tokens, added up over the layers."""
    device = gate_logits[0].device
    chosen = torch.zeros(num_experts, device=device)
    probabilities = torch.zeros(num_experts, device=device)
    count = torch.zeros((), device=device)
    for logits in gate_logits:
        weights = logits.to(device).softmax(-1)
        selected = weights.topk(top_k, -1).indices
        counted = torch.ones(len(weights), device=device) if valid is None else valid.to(device, torch.float32)
        chosen += count_pairs(selected.flatten(), num_experts, counted.repeat_interleave(top_k))
        probabilities = probabilities + weights.float().masked_fill(counted[:, None] == 0, 0).sum(0)
        count += counted.sum()
    return chosen, probabilities, count


class _Patches:
    """Modules of transformers whose function is replaced, for as long as a prepared model of theirs lives."""

    def __init__(self) -> None:
        self._users: dict[str, WeakSet[RouterLoss]] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def add(self, user: RouterLoss) -> None:
        name = user.module
        self._users.setdefault(name, WeakSet()).add(user)
        if name in self._originals:
            return
        stock = self._originals[name] = getattr(sys.modules[name], _NAME)

        @wraps(stock)
        def function(*args: object, **kwargs: object) -> Any:
            return (current().router_loss or stock)(*args, **kwargs)

        setattr(sys.modules[name], _NAME, function)

    def remove(self, user: RouterLoss) -> None:
        users = self._users.get(user.module, WeakSet())
        users.discard(user)
        if not users and user.module in self._originals:
            setattr(sys.modules[user.module], _NAME, self._originals.pop(user.module))


_patches = _Patches()


def _module_with_loss(model: nn.Module) -> str | None:
    for owner in type(model).__mro__:
        if "forward" in vars(owner) and hasattr(sys.modules.get(owner.__module__), _NAME):
            return owner.__module__
    return None


def attach_router_loss(model: nn.Module, state: ParallelState, module: str | None = None) -> Callable[[], None] | None:
    """Have a model's load-balancing loss count the tokens of all ranks.

    Args:
        model: a transformers model.
        module: where its forward finds the function, if that is not the module of the model's class.

    Returns:
        A function that takes it off, or None if the family has no such loss.
    """
    name = _module_with_loss(model) if module is None else import_module(module).__name__
    return None if name is None else RouterLoss(model, state, name).detach
