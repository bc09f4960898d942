"""Where a NaN or an infinity came from: the micro-batches of the step run again, this time with every value looked at.

Nothing is looked at in a normal step but its gradient norm, which is the same on all ranks: so they agree without a
word on whether to look. The random numbers of a step follow from its number on several ranks, so that it runs as it
did; in one process dropout draws another mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

MOST_IN_A_ROW = 10  # steps skipped before training stops: it would not come back by itself
_INPUT, _FORWARD, _LOSS, _BACKWARD, _GRADIENT = range(5)


class NotFiniteError(ArithmeticError):
    """A gradient that is not finite would have gone into the weights. They are as before the step."""


@dataclass(frozen=True, order=True)
class Finding:
    """The first value of a micro-batch that is not finite, on one rank. The least of all ranks' is where it began.

    Attributes:
        phase, place: in the order of the computation, which is the same on all ranks.
        rank: that has found it.
        text: what it is, in words.
    """

    phase: int
    place: int
    rank: int
    text: str


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kind(tensor: Any) -> str | None:
    """ "nan" or "inf" if a tensor holds one. Waits for the device."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
        return None
    values = _local(tensor.detach())
    if bool(values.isfinite().all()):
        return None
    return "nan" if bool(values.isnan().any()) else "inf"


class Finder:
    """Looks at what the modules of a model return, and at the gradients of that, while it is attached.

    Attributes:
        found: the first value that was not finite.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self._count = rank, 0
        self.found: Finding | None = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Look at the outputs of all modules within the block."""
        handles = [
            module.register_forward_hook(partial(self._look, name)) for name, module in model.named_modules() if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, phase: int, what: str | None, text: str) -> None:
        """Keep it unless something came before."""
        self._count += 1
        if what is not None and self.found is None:
            self.found = Finding(phase, self._count, self.rank, text.format(what))

    def look_at_inputs(self, inputs: Any) -> None:
        """Note what is not finite in a batch."""
        if isinstance(inputs, Mapping):
            for name, value in inputs.items():
                self.note(_INPUT, kind(value), f"{{}} in the batch's `{name}`")

    def look_at_loss(self, loss: Tensor) -> None:
        """Note a loss that is not finite."""
        self.note(_LOSS, kind(loss), "{} in the loss")

    def look_at_gradients(self, model: nn.Module) -> None:
        """Of parameters. In FSDP they are those of all ranks together."""
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.note(_GRADIENT, kind(parameter.grad), f"{{}} in the gradient of the parameter `{name}`")

    def _look(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a recomputation in the backward
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor):
                continue
            if (what := kind(tensor)) is not None and self.found is None:
                self.note(_FORWARD, what, f"{{}} in what `{name}` ({type(module).__name__}) returned{_why(module)}")
            self._count += 1
            if tensor.grad_fn is not None:  # else the hook would stay on a parameter
                tensor.register_hook(partial(self._look_back, name))

    def _look_back(self, name: str, gradient: Tensor) -> None:
        text = f"{{}} in the gradient of what `{name}` returned, made in the backward of what comes after it"
        self.note(_BACKWARD, kind(gradient) if self.found is None else None, text)


def _why(module: nn.Module) -> str:
    for name, parameter in module.named_parameters(recurse=False):
        if (what := kind(parameter)) is not None:
            return f", whose `{name}` holds {what} itself"
    return ""


def first_of_all(found: Finding | None) -> Finding | None:
    """The first of all ranks' findings. Collective: one all-gather of small objects over all ranks."""
    everyone = [found]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    return min((one for one in everyone if one is not None), default=None)


def has_broken_weights(model: nn.Module) -> bool:
    """Whether a parameter is not finite, on any rank. Collective: one all-gather of small objects over all ranks."""
    broken = any(kind(parameter) is not None for parameter in model.parameters())
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return broken
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, broken)
    return any(everyone)
