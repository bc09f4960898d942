"""What the head returns in place of logits: hidden states, and how to turn them into logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_veomni.errors import UnsupportedError
from hf_veomni.loss.head import HeadCall, Op, replay

T = Tensor
# Elementwise functions of one tensor and scalars, replayed on each chunk. The in-place forms map to the same.
_BINARY: dict[Callable[..., Any], tuple[Any, ...]] = {
    torch.mul: (T.mul, T.__mul__, T.__rmul__, torch.mul, T.multiply, torch.multiply),
    torch.div: (T.div, T.__truediv__, torch.div, T.divide, torch.divide, T.true_divide, torch.true_divide),
    torch.add: (T.add, T.__add__, T.__radd__, torch.add),
    torch.sub: (T.sub, T.__sub__, torch.sub, T.subtract, torch.subtract),
    torch.tanh: (T.tanh, torch.tanh),
}
_BINARY_IN_PLACE: dict[Callable[..., Any], tuple[Any, ...]] = {
    torch.mul: (T.mul_, T.__imul__, T.multiply_),
    torch.div: (T.div_, T.__itruediv__, T.divide_, T.true_divide_),
    torch.add: (T.add_, T.__iadd__),
    torch.sub: (T.sub_, T.__isub__, T.subtract_),
    torch.tanh: (T.tanh_, torch.tanh_),
}
_OUT_OF_PLACE = {form: function for function, forms in _BINARY.items() for form in forms}
_IN_PLACE = {form: function for function, forms in _BINARY_IN_PLACE.items() for form in forms}
_COMMUTATIVE = (torch.mul, torch.add)
_CASTS = (T.float, T.double, T.half, T.bfloat16, T.to, T.type)
_SAME_SHAPE_VIEWS = (T.view, T.reshape, torch.reshape, T.contiguous)
# Answered from the lazy logits' own metadata, without building anything.
_QUERIES = frozenset(
    [getattr(T, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf")]
    + [getattr(T, name).__get__ for name in ("grad_fn", "grad", "_base", "_version", "output_nr", "is_cuda", "is_cpu")]
    + [getattr(T, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn")]
    + [getattr(T, name).__get__ for name in ("is_mps", "is_xpu", "is_xla", "itemsize", "nbytes")]
    + [T.size, T.dim, T.ndimension, T.numel, T.nelement, T.stride, T.element_size, T.__len__, T.get_device]
    + [T.is_floating_point, torch.is_floating_point, T.is_complex, torch.is_complex, torch.numel, T.is_contiguous]
)


@dataclass
class Recipe:
    """How to make the logits: the head call, then elementwise functions. `real` holds them once they were made."""

    call: HeadCall
    dtype: torch.dtype
    ops: tuple[Op, ...] = ()
    real: Tensor | None = None
    version: int = 0  # of `real` as it was built
    detached: bool = False

    def build(self) -> Tensor:
        """The real logits [B, s, V] with their graph, whatever the grad mode is now, since they stand for the past."""
        if self.real is None:
            self.call.check_fresh()
            with torch.enable_grad():
                self.real = replay(self.ops, self.call.run(self.call.hidden))
            if self.detached:
                self.real = self.real.detach()
            elif self.real.requires_grad:
                self.real.register_hook(self.call.before_backward)
            self.version = self.real._version
        return self.real


class _Track(torch.autograd.Function):
    """Ties lazy logits to the graph, for code that torch functions do not see (another autograd.Function)."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe, ctx.inputs = recipe, inputs
        return LazyLogits(recipe)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recipe, needed = ctx.recipe, ctx.needs_input_grad[1:]
        if recipe.real is not None and recipe.real._version != recipe.version:
            raise UnsupportedError(
                "These logits were changed in place and then handed to an autograd.Function, which torch functions do "
                "not see: pass `logits + 0`, or prepare with chunked_loss=False."
            )
        recipe.call.before_backward(grads[0])
        recipe.call.check_gathered()
        # From a leaf: else a tied weight would get the gradient of the embedding as well, and FSDP's hooks on the way
        # would take the end of this nested backward for the end of the outer one.
        inputs = [ctx.inputs[0].detach().requires_grad_(), *ctx.inputs[1:]]
        with torch.enable_grad():
            logits = replay(recipe.ops, recipe.call.run(inputs[0]))
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(logits, wanted, grads[0], allow_unused=True))
        return None, *(next(found) if need else None for need in needed)


class LazyLogits(Tensor):
    """Lazy logits: they stand for logits [B, s, V] that were not computed.

    Shape, dtype and device are answered at once. Scaling or capping by scalars and dtype casts are recorded and later
    replayed on each chunk of the loss. Any other function builds the real logits, once, with their graph; from then on
    lazy logits are those logits, for the loss as well.
    """

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> LazyLogits:
        call = recipe.call
        shape = (*call.hidden.shape[:-1], call.vocabulary)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=recipe.dtype, device=call.hidden.device)
        made.recipe = recipe
        return made

    @classmethod
    def make(cls, recipe: Recipe) -> Tensor:
        """Lazy logits that require grad exactly if the real logits would."""
        if recipe.detached:
            return cls(recipe)
        return _Track.apply(recipe, recipe.call.hidden, *recipe.call.parameters)

    def of_tokens(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        """The logits of other tokens: `take` maps hidden states [B, s, C] to theirs, and logits [B, s, V] alike."""
        if self.recipe.real is not None:
            return take(self.recipe.real)
        call = self.recipe.call
        return LazyLogits.make(replace(self.recipe, call=replace(call, hidden=take(call.hidden))))

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        state = "not computed: any look at the values builds them" if self.recipe.real is None else "computed"
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    @classmethod
    def __torch_function__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first.recipe.real is None:
            if _is_fsdp_hook(func, args):
                return first.recipe.call.hooks.append(args[1])
            if func in _QUERIES or (func is T.type and len(args) == 1 and not kwargs):
                return super().__torch_function__(func, types, args, kwargs)
            answer = _lazily(func, first, args[1:], kwargs)
            if answer is not None:
                return answer
        elif func in _OUT_OF_PLACE and len(args) == 2 and _OUT_OF_PLACE[func] in _COMMUTATIVE and not kwargs:
            if isinstance(args[1], LazyLogits) and args[1].recipe.real is None:
                answer = _record(_OUT_OF_PLACE[func], args[1], (first,))
                if answer is not None:
                    return answer
        args, kwargs = tree_map_only(LazyLogits, lambda x: x.recipe.build(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        # Below autograd: `_Track` carries the gradient.
        args, kwargs = tree_map_only(LazyLogits, lambda x: x.recipe.build().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_fsdp_hook(func: Any, args: Any) -> bool:
    """FSDP2 hooks the outputs of its units: that must not compute them, and runs when the loss goes backward."""
    return func is T.register_hook and str(getattr(args[1], "__module__", "")).startswith("torch.distributed.fsdp")


def _lazily(func: object, logits: LazyLogits, operands: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The answer to `func(logits, *operands, **kwargs)` that needs no real logits, if there is one."""
    if func in _CASTS:
        return _cast(func, logits, operands, kwargs)
    if func is T.__getitem__:
        return logits if _takes_all(operands[0], logits.shape) else None
    if func in _SAME_SHAPE_VIEWS:
        shape = operands[0] if len(operands) == 1 and not isinstance(operands[0], int) else operands
        same = func is T.contiguous or (isinstance(shape, Sequence) and tuple(shape) == tuple(logits.shape))
        return logits if same and not kwargs else None
    if kwargs:
        return None
    if func in (T.detach, torch.detach):
        return LazyLogits.make(replace(logits.recipe, call=logits.recipe.call.detach(), detached=True))
    if func in (T.clone, torch.clone):
        return LazyLogits.make(replace(logits.recipe))
    if func in _OUT_OF_PLACE:
        return _record(_OUT_OF_PLACE[func], logits, operands)
    if func in _IN_PLACE:
        changed = _record(_IN_PLACE[func], logits, operands)
        if changed is None or changed.dtype != logits.dtype:
            return None
        logits.recipe.ops = changed.recipe.ops
        return logits
    return None


def _takes_all(index: object, shape: torch.Size) -> bool:
    """Whether `logits[index]` is all of the logits, in their shape."""
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) > len(shape):
        return False
    return all(
        part is Ellipsis or (isinstance(part, slice) and part in (slice(None), slice(0, None))) for part in parts
    )


def _record(function: Callable[..., Tensor], logits: LazyLogits, operands: tuple[Any, ...]) -> Any:
    """Append an elementwise function with scalar operands; None if it is not one."""
    kept = []
    for operand in operands:
        if isinstance(operand, Tensor):
            if operand.dim() or operand.requires_grad or isinstance(operand, LazyLogits):
                return None
            operand = operand.detach().clone()
        elif not isinstance(operand, (int, float)):
            return None
        kept.append(operand)
    sample = function(_sample(logits), *kept)
    if sample.device != logits.device:
        return None
    recipe = logits.recipe
    return LazyLogits.make(replace(recipe, dtype=sample.dtype, ops=(*recipe.ops, (function, tuple(kept)))))


def _cast(func: Any, logits: LazyLogits, operands: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Append a dtype cast; None if `func` does anything else (another device, a copy, the name of the type)."""
    if kwargs.keys() - {"dtype", "device", "non_blocking"} or any(isinstance(x, Tensor) for x in operands):
        return None
    sample = func(_sample(logits), *operands, **kwargs)
    if not isinstance(sample, Tensor) or sample.device != logits.device or not sample.is_floating_point():
        return None
    if sample.dtype == logits.dtype:
        return logits
    recipe = logits.recipe
    return LazyLogits.make(replace(recipe, dtype=sample.dtype, ops=(*recipe.ops, (T.to, (sample.dtype,)))))


def _sample(logits: LazyLogits) -> Tensor:
    """An empty tensor of the logits' rank, dtype and device: what a function gives on it tells dtype and device."""
    return torch.empty((0,) * logits.dim(), dtype=logits.dtype, device=logits.device)
