"""Arithmetic over sharded parameters beside plain tensors: penalties on weights, distances to other weights.

DTensor answers much of it with numbers of this rank alone, or with gradients that are placed otherwise than the
parameter. So it is asked for little, and what it gives is made plain at once:

    by element, with numbers or fixed tensors of the same shape    a shard again, of the same placement
    the sum or the norm of all elements                            plain, added up over the ranks
    anything else                                                  of the full parameters, gathered

A rank's loss is a part of the mean over the ranks, so the gradient of what became plain is the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
_SUMS = ("sum", "norm")
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "pow", "neg", "abs")
_BY_ELEMENT = {
    *_OPERATORS,
    *(f"__{sided}{name}__" for name in _OPERATORS for sided in ("", "r")),
    *("square", "sqrt", "clone", "detach", "to", "float", "double"),
}
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in (*_OPERATORS, "floordiv", "mod", "and", "or", "xor"))}
# What only describes a tensor, or is about its place in a graph. Others would gather it, also where one rank asks.
_DESCRIBE = frozenset(
    "__deepcopy__ __format__ __hash__ __len__ __repr__ __reduce_ex__ backward data_ptr dim element_size get_device "
    "is_complex is_contiguous is_floating_point is_inference is_pinned is_shared is_signed ndimension nelement numel "
    "register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad size storage_offset stride type "
    "untyped_storage".split()
)


@contextmanager
def sharded_arithmetic(model: nn.Module) -> Iterator[None]:
    """Inside, functions of a prepared model's parameters, alone or beside plain tensors, are those of one process.

    For a term of the loss over `model.parameters()`; inside of a Trainer's `compute_loss` it is on already. The
    gradient is averaged over the ranks, as that of the rest of the loss is.

    Collectives: an all-reduce for a sum or a norm of all elements, an all-gather of each parameter for any function
    but arithmetic by element; the backward is a mean over the ranks, or a reduce-scatter. Every rank must compute the
    same.
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


class _Owned(torch.autograd.Function):
    """A parameter whose gradient is placed as itself, and on a GPU is added after FSDP's on other streams."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor, streams: tuple[Any, ...]) -> Tensor:
        ctx.like, ctx.streams = (parameter.device_mesh, parameter.placements), streams
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        for stream in ctx.streams:
            torch.accelerator.current_stream().wait_stream(stream)
        return gradients[0].redistribute(*ctx.like), None


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
        if current().call is not None or name in _PROPERTIES or name in _DESCRIBE:
            return func(*args, **options)
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
        if not shards:
            return func(*args, **options)
        if (changed := _changed(name, args, options)) is not None:
            args, options = tree_map_only(Tensor, partial(_sharded, like=changed), (args, options))
            return func(*args, **options)
        args, options = tree_map_only(DTensor, self._own, (args, options))
        if not _stays_sharded(name, args, options, tensors, shards[0]):
            args, options = tree_map_only(DTensor, as_plain, (args, options))
            return func(*args, **options)
        args, options = tree_map_only(Tensor, partial(_sharded, like=shards[0]), (args, options))
        found = func(*args, **options)
        return as_plain(found) if name in _SUMS else found

    def _own(self, tensor: DTensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        streams = ()
        if tensor.device.type != "cpu":
            comm = self.model._get_fsdp_state()._comm_ctx
            streams = (comm.reduce_scatter_stream, comm.all_reduce_stream)
        return _Owned.apply(tensor, streams)  # type: ignore[return-value]


def _stays_sharded(name: str, args: Any, options: Any, tensors: Sequence[Tensor], like: DTensor) -> bool:
    """Whether DTensor is asked: shards of one kind, and beside them what is the same on every rank."""
    kind = (like.device_mesh, like.placements, like.shape)
    shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if any((shard.device_mesh, shard.placements, shard.shape) != kind for shard in shards):
        return False  # experts have a mesh of their own
    if any(place.is_partial() for place in like.placements):
        return False
    if any(tensor.requires_grad or tensor.shape not in ((), like.shape) for tensor in plain):
        return False
    if name in _SUMS:
        return len(args) == 1 and not options
    return name in _BY_ELEMENT


def _changed(name: str, args: Any, options: Any) -> DTensor | None:
    """The shard that a function writes to, which a gathered copy must not stand in for."""
    given = options.get("out")
    if args and (name in _IN_PLACE or (name.endswith("_") and not name.startswith("__"))):
        given = args[0]
    return given if isinstance(given, DTensor) else None


def _sharded(tensor: Tensor, like: DTensor) -> Tensor:
    """What is whole and the same on every rank, as DTensor takes it beside `like`."""
    if isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
