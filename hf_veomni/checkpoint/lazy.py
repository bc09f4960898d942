"""Tensors of a checkpoint that are not read yet: what is done to them is noted, and a part is read when it is wanted.

A conversion from the files' layout to the model's (one tensor an expert -> a stack, a fused projection -> three) is
written by transformers for full tensors. Run on the part that a rank owns it goes wrong, often silently:

    files       gate [I, C], up [I, C] of each expert
    model       gate_up [E, 2 I, C], of which rank 0 of 2 owns rows 0 ... I - 1: all of gate, none of up
    by part     half of gate and half of up: the same shape, other numbers

So the conversion sees tensors with their global shapes here, and the parts that a rank owns are traced back through
it to the bytes in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.modeling_utils import str_to_torch_dtype

Box = tuple[slice, ...]  # begin and end in each dimension, no steps
Reader = Callable[[Box], Tensor]

_RULES: dict[Any, Callable[..., Any]] = {}


class LazyTensor(Tensor):
    """A tensor of which parts can be read. Operations on it give lazy tensors again, with global shapes.

    What has a rule below is traced to the part of its inputs that it needs; any other operation runs on full tensors
    when its result is read. An operation whose result is no tensor (a comparison) reads at once.
    """

    _read: Reader

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Reader) -> LazyTensor:
        lazy = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device="cpu")  # type: ignore[attr-defined]
        lazy._read = read
        return lazy

    def read(self, box: Box | None = None) -> Tensor:
        """The values in `box`, full by default; a plain tensor on the CPU."""
        box = tuple(slice(0, size) for size in self.shape) if box is None else box
        sizes = [part.stop - part.start for part in box]
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype)
        return self._read(box)

    def __repr__(self, **_: object) -> str:
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        return rule(*args, **(kwargs or {})) if rule is not None else _run_full(func, args, kwargs or {})


def open_lazy(path: str, handles: Any) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name; `handles` (an `ExitStack`) keeps it open."""
    handle = handles.enter_context(safe_open(path, framework="pt"))
    return {key: _from_file(handle, key) for key in handle.keys()}


def _from_file(handle: Any, key: str) -> LazyTensor:
    part = handle.get_slice(key)

    def read(box: Box) -> Tensor:
        return part[box] if box else handle.get_tensor(key)

    return LazyTensor(part.get_shape(), str_to_torch_dtype[part.get_dtype()], read)


def _full(value: Any) -> Any:
    """`value` with the lazy tensors in it read, contiguous as lazy ones claim to be: `view` depends on it."""
    return tree_map_only(LazyTensor, lambda lazy: lazy.read().contiguous(), value)


def _run_full(func: Any, args: Any, kwargs: Any) -> Any:
    if func._schema.is_mutable:
        raise TypeError(f"{func} writes into a tensor of the checkpoint.")
    try:
        # Shapes and dtypes alone; what depends on values has no answer on meta.
        shaped = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), (args, kwargs))
        outcome = func(*shaped[0], **{**shaped[1], **({"device": "meta"} if "device" in kwargs else {})})
    except (NotImplementedError, RuntimeError):
        outcome = None
    if isinstance(outcome, Tensor):
        return LazyTensor(outcome.shape, outcome.dtype, lambda box: func(*_full(args), **_full(kwargs))[box])
    return func(*_full(args), **_full(kwargs))


def _rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _lazy(value: Tensor) -> LazyTensor:
    return value if isinstance(value, LazyTensor) else LazyTensor(value.shape, value.dtype, value.__getitem__)


def _replace(box: Box, dim: int, part: slice) -> Box:
    return (*box[:dim], part, *box[dim + 1 :])


aten = torch.ops.aten


@_rule(aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default)
def _same(source: LazyTensor, **_: object) -> LazyTensor:
    return LazyTensor(source.shape, source.dtype, source.read)


@_rule(aten._to_copy.default)
def _cast(source: LazyTensor, *, dtype: torch.dtype | None = None, **_: object) -> LazyTensor:
    wanted = dtype or source.dtype
    return LazyTensor(source.shape, wanted, lambda box: source.read(box).to(wanted))


@_rule(aten.permute.default)
def _permute(source: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    order = [dim % source.dim() for dim in dims]

    def read(box: Box) -> Tensor:
        inner = {dim: part for dim, part in zip(order, box, strict=True)}
        return source.read(tuple(inner[dim] for dim in range(source.dim()))).permute(order)

    return LazyTensor([source.shape[dim] for dim in order], source.dtype, read)


@_rule(aten.transpose.int)
def _transpose(source: LazyTensor, first: int, second: int) -> LazyTensor:
    order = list(range(source.dim()))
    order[first], order[second] = order[second], order[first]
    return _permute(source, order)


@_rule(aten.t.default)
def _t(source: LazyTensor) -> LazyTensor:
    return _permute(source, range(source.dim())[::-1])


@_rule(aten.slice.Tensor)
def _slice(
    source: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor:
    if step != 1:
        return _run_full(aten.slice.Tensor, (source, dim, start, end, step), {})
    dim = dim % source.dim()
    begin, stop, _ = slice(start, end).indices(source.shape[dim])
    shape = [*source.shape]
    shape[dim] = max(stop - begin, 0)
    return LazyTensor(
        shape,
        source.dtype,
        lambda box: source.read(_replace(box, dim, slice(box[dim].start + begin, box[dim].stop + begin))),
    )


@_rule(aten.split_with_sizes.default)
def _split_with_sizes(source: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [_slice(source, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@_rule(aten.split.Tensor)
def _split(source: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    return [_slice(source, dim, start, start + size) for start in range(0, source.shape[dim], size)]


@_rule(aten.unsqueeze.default)
def _unsqueeze(source: LazyTensor, dim: int) -> LazyTensor:
    dim = dim % (source.dim() + 1)
    shape = [*source.shape[:dim], 1, *source.shape[dim:]]
    return LazyTensor(shape, source.dtype, lambda box: source.read((*box[:dim], *box[dim + 1 :])).unsqueeze(dim))


@_rule(aten.select.int)
def _select(source: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim, index = dim % source.dim(), index % source.shape[dim]
    shape = [*source.shape[:dim], *source.shape[dim + 1 :]]
    return LazyTensor(
        shape,
        source.dtype,
        lambda box: source.read((*box[:dim], slice(index, index + 1), *box[dim:])).squeeze(dim),
    )


@_rule(aten.unbind.int)
def _unbind(source: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(source, dim, place) for place in range(source.shape[dim])]


@_rule(aten.squeeze.dim)
def _squeeze(source: LazyTensor, dim: int) -> LazyTensor:
    return _select(source, dim, 0) if source.shape[dim] == 1 else _same(source)


@_rule(aten.cat.default)
def _cat(parts: Sequence[Tensor], dim: int = 0) -> LazyTensor:
    sources = [_lazy(part) for part in parts]
    dim = dim % sources[0].dim()
    shape = [*sources[0].shape]
    shape[dim] = sum(part.shape[dim] for part in sources)
    _check_alike([[*part.shape[:dim], *part.shape[dim + 1 :]] for part in sources])

    def read(box: Box) -> Tensor:
        found, offset = [], 0
        for part in sources:
            begin, end = max(box[dim].start - offset, 0), min(box[dim].stop - offset, part.shape[dim])
            if begin < end:
                found.append(part.read(_replace(box, dim, slice(begin, end))))
            offset += part.shape[dim]
        return torch.cat(found, dim) if len(found) > 1 else found[0]

    return LazyTensor(shape, sources[0].dtype, read)


@_rule(aten.stack.default)
def _stack(parts: Sequence[Tensor], dim: int = 0) -> LazyTensor:
    sources = [_lazy(part) for part in parts]
    dim = dim % (sources[0].dim() + 1)
    _check_alike([[*part.shape] for part in sources])

    def read(box: Box) -> Tensor:
        inner = (*box[:dim], *box[dim + 1 :])
        return torch.stack([part.read(inner) for part in sources[box[dim]]], dim)

    shape = [*sources[0].shape[:dim], len(sources), *sources[0].shape[dim:]]
    return LazyTensor(shape, sources[0].dtype, read)


def _check_alike(shapes: list[list[int]]) -> None:
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"The tensors to join have different shapes: {', '.join(map(str, shapes[:4]))}.")
