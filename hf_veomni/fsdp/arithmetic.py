"""Arithmetic over sharded parameters beside plain tensors: penalties on weights, distances to other weights.

A shard takes part in torch's functions as a DTensor, with the values of the whole parameter, and stays a shard:
`p.square().sum()` is a number of the whole. What it cannot meet is a plain tensor, such as a loss. There

    loss, logits (with gradients)   the DTensor becomes plain, whole on every rank
    weights of the same shape       they become a shard: every rank must hold the same
    anything else                   the DTensor becomes plain, as where experts meet parameters of another mesh

A rank's loss is a part of the mean over the ranks, so the gradient of what became plain is the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_veomni import hf
from hf_veomni.context import current

_PROPERTIES = ("__get__", "__set__", "__delete__")


@contextmanager
def sharded_arithmetic(model: nn.Module) -> Iterator[None]:
    """Inside, parameters of a prepared model may be added to, subtracted from or compared with plain tensors.

    For a term of the loss over `model.parameters()`; inside of a Trainer's `compute_loss` it is on already. Values and
    gradients are those of one process: the gradient is averaged over the ranks, as that of the rest of the loss is.

    Collective: where a sharded result meets a plain tensor, an all-reduce of it, or an all-gather of a parameter; its
    backward is an all-reduce or a reduce-scatter (mean). Every rank must compute the same.
    """
    base = hf.base_model(model)
    if not isinstance(base, FSDPModule):
        yield
        return
    mixing = _Mixing(base)
    parts = dict.fromkeys([base, base.base_model, hf.find_backbone(base)])
    handles = [part.register_forward_pre_hook(mixing.enter, prepend=True) for part in parts]
    handles += [part.register_forward_hook(mixing.leave, always_call=True) for part in parts]
    try:
        with mixing:
            yield
    finally:
        for handle in handles:
            handle.remove()


def as_plain(tensor: Any) -> Any:
    """A DTensor as a plain tensor, whole on every rank, with the mean over the ranks as gradient; others as they are.

    Collective: see `sharded_arithmetic`.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    shards = not any(placement.is_partial() for placement in tensor.placements)
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim) if shards else tensor.full_tensor()
    return _MeanOfRanks.apply(whole, mesh, shards) if whole.requires_grad else whole


class _MeanOfRanks(torch.autograd.Function):
    """Its gradient is the mean over the ranks; what is `summed` anyway is only divided."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: DeviceMesh, summed: bool) -> Tensor:
        ctx.mesh, ctx.summed = mesh, summed
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        mean = gradients[0] / ctx.mesh.size()
        for axis in () if ctx.summed else range(ctx.mesh.ndim):
            dist.all_reduce(mean, group=ctx.mesh.get_group(axis))
        return mean, None, None


class _AfterReduction(torch.autograd.Function):
    """A parameter whose gradient is added, on a GPU, after FSDP's on other streams."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, streams: Any) -> Tensor:
        ctx.streams = streams
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        stream = torch.accelerator.current_stream()
        for other in (ctx.streams.reduce_scatter_stream, ctx.streams.all_reduce_stream):
            stream.wait_stream(other)
        return gradients[0], None


class _Mixing(TorchFunctionMode):
    """Off the stack of modes while the model runs, where torch.compile would trace it, unless two sequences run at
    once: while the one is in the model, the other may be in code of the user."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.depth = model, 0

    def enter(self, module: nn.Module, args: Any) -> None:
        if self.depth or (current().flight is None and _get_current_function_mode() is self):
            self.depth += 1
            if self.depth == 1:
                self.__exit__(None, None, None)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.depth:
            self.depth -= 1
            if self.depth == 0:
                self.__enter__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options: Any = kwargs or {}
        name = getattr(func, "__name__", "")
        if current().call is not None or name in _PROPERTIES:
            return func(*args, **options)
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        if not shards:
            return func(*args, **options)
        args, options = tree_map_only(DTensor, self._ordered, (args, options))
        plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
        several = len({shard.device_mesh for shard in shards}) > 1  # experts have one of their own
        if (
            plain
            and not several
            and all(_stays(shard) and _is_fixed(tensor, shard) for shard in shards for tensor in plain)
        ):
            args, options = tree_map_only(Tensor, lambda tensor: _sharded(tensor, shards[0]), (args, options))
        elif plain or several:
            args, options = tree_map_only(DTensor, as_plain, (args, options))
        elif not name.endswith("_") or name.startswith("__"):  # what works in place cannot be tried
            try:
                return func(*args, **options)
            except (NotImplementedError, RuntimeError):  # DTensor cannot do it
                args, options = tree_map_only(DTensor, as_plain, (args, options))
        return func(*args, **options)

    def _ordered(self, tensor: DTensor) -> Tensor:
        late = tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled() and tensor.device.type != "cpu"
        return _AfterReduction.apply(tensor, self.model._get_fsdp_state()._comm_ctx) if late else tensor  # type: ignore


def _stays(shard: DTensor) -> bool:
    """Not sums that are still to be added up: DTensor would take a number beside them from one rank alone."""
    return shard.dim() > 0 and not any(placement.is_partial() for placement in shard.placements)


def _is_fixed(tensor: Tensor, shard: DTensor) -> bool:
    return not tensor.requires_grad and (tensor.dim() == 0 or tensor.shape == shard.shape)


def _sharded(tensor: Tensor, like: DTensor) -> Tensor:
    if isinstance(tensor, DTensor) or tensor.dim() == 0:
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
