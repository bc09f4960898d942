"""Units of one dtype: FSDP2 reduces the gradients of a unit in one buffer, so what is trained in it shares a dtype.

Some families keep a few parameters in fp32, and adapters are fp32 beside biases or norms of a bf16 model. What has
another dtype than the rest of its unit moves to units inside of it, of the children through which it is reached:

    layer           unit        frozen weights and adapters
      self_attn     unit        its biases alone; all else belongs to the layer's
      mlp
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_veomni.errors import UnsupportedError
from hf_veomni.hf import peft as hf_peft

Parameters = frozenset[nn.Parameter]


@dataclass(frozen=True)
class Unit:
    """What one call of `fully_shard` gets.

    Attributes:
        keep: hold the full weight between forward and backward; None leaves that to FSDP (the root).
        only: the parameters of the modules that it takes; None takes all that no unit inside of it has.
        leave: parameters that units inside of it take, though they come later.
    """

    modules: tuple[nn.Module, ...]
    keep: bool | None
    only: Parameters | None = None
    leave: Parameters = frozenset()

    def ignored(self) -> set[nn.Parameter]:
        """What `fully_shard` has to pass over. Look at it just before the call: earlier ones replace parameters."""
        if self.only is None:
            return set(self.leave)
        return {p for module in self.modules for p in module.parameters()} - self.only


def split_by_dtype(
    units: Sequence[tuple[Sequence[nn.Module], bool | None]], model: nn.Module, ignored: Iterable[nn.Parameter] = ()
) -> list[Unit]:
    """Units whose trained parameters have one dtype each, in the order in which they are to be sharded.

    Args:
        units: modules and whether to keep them, innermost first.
        ignored: parameters that stay unsharded.

    Raises:
        UnsupportedError: one module, or one adapter, holds trained parameters of several dtypes itself.
    """
    claimed, full = set(ignored), frozenset(ignored)
    taken = {module for modules, _ in units for module in modules}
    found: list[Unit] = []
    for part, keep in ((part, keep) for modules, keep in units for part in _parts(modules)):
        own = dict.fromkeys(p for module in part for p in module.parameters() if p not in claimed)
        claimed.update(own)
        found += _split(tuple(part), keep, [p for p in own if p.requires_grad], taken, full, model)
        taken.update(module for unit in found for module in unit.modules)
    return found


def _parts(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The modules of a unit by the dtypes that are trained in them (a norm in fp32, a head in bf16).

    Modules that share a parameter stay together, and what is frozen goes with the first that is trained.
    """
    joined: list[list[nn.Module]] = []
    for module in modules:
        own = set(module.parameters())
        partners = [part for part in joined if any(not own.isdisjoint(m.parameters()) for m in part)]
        joined = [part for part in joined if part not in partners]
        joined.append([m for part in partners for m in part] + [module])
    dtypes = [frozenset(p.dtype for m in part for p in m.parameters() if p.requires_grad) for part in joined]
    first = next(filter(None, dtypes), frozenset())
    parts: dict[Any, list[nn.Module]] = {}
    for part, trained in zip(joined, dtypes, strict=True):
        parts.setdefault(trained or first, []).extend(part)
    return list(parts.values())


def _split(
    modules: tuple[nn.Module, ...],
    keep: bool | None,
    trained: Sequence[nn.Parameter],
    taken: set[nn.Module],
    full: Parameters,
    model: nn.Module,
) -> list[Unit]:
    sizes: Counter[torch.dtype] = Counter()
    for parameter in trained:
        sizes[parameter.dtype] += parameter.numel()
    if len(sizes) < 2:
        return [Unit(modules, keep, leave=full)]
    for main, _ in sizes.most_common():
        odd = frozenset(p for p in trained if p.dtype != main)
        try:
            inner = list(_inner_units(modules, keep, odd, set(taken)))
        except _Inseparable:
            continue
        return [Unit(modules, keep, leave=odd | full), *inner]
    names = {parameter: name for name, parameter in model.named_parameters()}
    firsts = {p.dtype: names[p] for p in reversed(trained)}
    listed = ", ".join(f"'{name}' in {str(dtype).removeprefix('torch.')}" for dtype, name in firsts.items())
    raise UnsupportedError(
        f"Parameters of one FSDP unit are trained in several dtypes, {listed}, and no modules separate them: give "
        "them one dtype (`dtype=` of from_pretrained, `autocast_adapter_dtype=False` of get_peft_model, "
        "`parameter.data = parameter.data.float()`), or freeze those of one dtype."
    )


class _Inseparable(Exception):
    """A module reaches parameters of several dtypes by itself."""


def _inner_units(
    modules: Iterable[nn.Module], keep: bool | None, odd: Parameters, taken: set[nn.Module]
) -> Iterator[Unit]:
    for dtype in {parameter.dtype: None for parameter in odd}:
        mine = {parameter for parameter in odd if parameter.dtype == dtype}
        for module in modules:
            for child in _hosts(module, mine, taken):
                inside = frozenset(mine.intersection(child.parameters()))
                mine -= inside
                taken.add(child)
                yield Unit((child,), keep, only=inside)


def _hosts(module: nn.Module, wanted: set[nn.Parameter], taken: set[nn.Module]) -> Iterator[nn.Module]:
    """Modules inside of `module` that are called, are no unit yet, and hold all of `wanted` that `module` has."""
    if hf_peft.is_adapter(module) and not wanted.isdisjoint(module.parameters()):
        raise _Inseparable  # some of them read the weights of their parts without a call
    if not wanted.isdisjoint(module.parameters(recurse=False)):
        raise _Inseparable
    for child in module.children():
        if wanted.isdisjoint(child.parameters()):
            continue
        if isinstance(child, (nn.ParameterDict, nn.ParameterList)):
            raise _Inseparable
        if type(child).forward is nn.Module.forward or isinstance(child, nn.ModuleList) or child in taken:
            yield from _hosts(child, wanted, taken)
        else:
            yield child


def cast_inputs(model: nn.Module, units: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast floating inputs of each module outside of `units` that has parameters itself, where no autocast does it.

    FSDP2 would cast what the root is given, and so round what the model counts with (seconds of video, time series).
    """
    inside = {child for unit in units for child in unit.modules()}
    for module in model.modules():
        if module not in inside and module is not model and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_Cast(dtype), with_kwargs=True)


@dataclass(frozen=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: object, kwargs: object) -> Any:
        return tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, value: Tensor) -> Tensor:
        kind = value.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return value
        return value.to(self.dtype) if value.is_floating_point() else value
