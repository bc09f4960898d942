"""Tensors whose values the host keeps while they travel to a device, so that nobody has to ask the device for them.

    collator    remember(position_ids)          on the CPU: the tensor is its own copy
    loader      .to(device), .pin_memory()      the copy on the host comes along
    model       on_host(position_ids)           the copy, without waiting for the device

Where nothing is known, `on_host` copies, for which the host waits until the device has done all that it was given.

The fake tensors of a dry run have no values, but may have remembered ones: `on_host` gives real numbers, and so does
what is computed from them, while everything else stays fake.

torch counts changes in place, by which a copy that no longer holds is noticed. It does not count what is written
through `tensor.data` or numpy, and what a collective writes (`dist.broadcast` into a tensor): `forget` such a tensor
before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

Made = TypeVar("Made")
_HOST = "_omni_host"  # on a fake tensor, of which torch makes no subclass


class Remembered(Tensor):
    """A tensor like any other that also has its values on the host.

    `to`, `cuda` and `pin_memory` hand them on; every other operation gives a plain tensor. After a change in place on
    the device the copy counts no more; on the CPU the tensor is its own copy.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    _host: Tensor | None  # None: the tensor itself
    _versions: tuple[int, int]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _carry(self, super().to(*args, **kwargs))

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return _carry(self, super().cuda(*args, **kwargs))

    def pin_memory(self, *args: Any, **kwargs: Any) -> Tensor:
        return _carry(self, super().pin_memory(*args, **kwargs))

    def __reduce_ex__(self, protocol: object) -> Any:
        """Between processes (a loader's workers): the values once, not twice."""
        return remember, (on_host(self), self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return remember(on_host(self).clone(), self.device)


class _Values(Tensor):
    """Values of a fake tensor. Functions of them and of nothing fake are computed; others are as fake as the rest."""

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_Values, forget, (args, kwargs or {}))
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return tree_map_only(Tensor, as_values, func(*args, **kwargs))


def as_values(tensor: Tensor) -> Tensor:
    """A real tensor of the CPU as one that keeps its values in a dry run, through whatever code computes from it."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(_Values)  # pyright: ignore[reportReturnType]


def make(function: Callable[..., Made], *args: object, **kwargs: object) -> Made:
    """What the host computes from plain numbers and real tensors: in a dry run too it has values."""
    with unset_fake_temporarily():
        return function(*args, **kwargs)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # of inference mode nothing is counted


def _known(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, _Values):
        return tensor
    if isinstance(tensor, FakeTensor):
        host, versions = vars(tensor).get(_HOST, (None, None))
        return None if host is None or versions != (_version(tensor), _version(host)) else as_values(host)
    if not isinstance(tensor, Remembered):
        return None
    if tensor._host is None:
        return forget(tensor)
    return tensor._host if tensor._versions == (_version(tensor), _version(tensor._host)) else None


def _carry(source: Remembered, moved: Tensor) -> Tensor:
    if moved is source:
        return source
    known = _known(source)
    return forget(moved) if known is None else with_values(moved, known.to(moved.dtype))


def forget(tensor: Tensor) -> Tensor:
    """The same tensor as a plain one."""
    if isinstance(tensor, _Values):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor)
    return tensor.as_subclass(Tensor) if isinstance(tensor, Remembered) else tensor


def with_values(tensor: Tensor, host: Tensor) -> Tensor:
    """`tensor` with `host`, values that were read from it or that it was made of."""
    plain, host = forget(tensor), forget(host)
    if torch.compiler.is_compiling() or plain.is_inference():
        return plain  # a graph takes no subclass, and torch counts no changes of the other
    if isinstance(plain, FakeTensor):
        if not isinstance(host, FakeTensor):
            vars(plain)[_HOST] = (host, (_version(plain), _version(host)))
        return plain
    own = host.device == plain.device and is_same(host, plain)
    made: Any = plain.as_subclass(Remembered)
    made._host, made._versions = None if own else host, (_version(plain), _version(host))
    return made


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same elements."""
    places = [(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype) for x in (one, other)]
    return places[0] == places[1]


def remember(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A tensor of the CPU, or its copy on `device`, that keeps its values on the host."""
    plain = forget(tensor)
    assert plain.device.type == "cpu", plain.device
    return with_values(move(plain, device), plain)


def move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """A plain tensor of the CPU on `device`, without waiting for it; in a dry run a fake one."""
    moved = tensor if device is None else tensor.to(device, non_blocking=True)
    mode = active_fake_mode()
    return moved if mode is None else mode.from_tensor(moved)


def knows(tensor: object) -> bool:
    """Whether `on_host` of this tensor waits for nothing."""
    return isinstance(tensor, Tensor) and _known(tensor) is not None


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU; where they are not known the host waits for the device."""
    known = _known(tensor)
    return forget(tensor).cpu() if known is None else known


def apply(function: Callable[..., Tensor], tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
    """`function(tensor, ...)`, on the host too where the values are known there."""
    known = _known(tensor)
    made = function(forget(tensor), *args, **kwargs)
    return made if known is None else with_values(made, function(known, *args, **kwargs))


def forget_in_graphs(model: nn.Module) -> Callable[[], None]:
    """Hand plain tensors to a model that is compiled as a whole, since torch's graphs take no others.

    Returns:
        A function that removes this.
    """

    def forget_all(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return _forgotten(args, kwargs) if torch.compiler.is_compiling() else None  # pyright: ignore[reportCallIssue]

    return model.register_forward_pre_hook(forget_all, with_kwargs=True, prepend=True).remove


@torch.compiler.disable  # what a graph begins with is its input
def _forgotten(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return tree_map_only(Tensor, forget, (args, kwargs))
