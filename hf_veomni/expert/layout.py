"""Which experts modules a model has, and which rank owns which expert: nothing here moves data.

Shapes: E experts of a layer, e = E / ep on this rank.

Rank r of an EP group of ep ranks owns the experts r * e ... (r + 1) * e - 1 of every layer. Example, ep=2, dp_shard=2,
sp=2 and E=4; ep is the innermost axis, so an EP group is a neighbourhood, as an SP group is:

    rank            0       1       2       3
    row             A       A       B       B         dp_shard
    tokens          first   second  first   second    sp
    experts         0 1     2 3     0 1     2 3       ep
    shard           0       0       1       1         efsdp: these ranks shard the experts' parameters
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert.families import can_convert


@dataclass(frozen=True)
class ExpertsModule:
    """One layer's experts.

    Attributes:
        name: of `experts` in the model.
        experts: the stock module with stacked parameters [E, ...].
        outer: what its parent calls: `experts` itself, or the PEFT wrapper around it.
        num_experts: E.
        parameters: names of the stacked parameters in `experts`.
    """

    name: str
    experts: nn.Module
    outer: nn.Module
    num_experts: int
    parameters: tuple[str, ...]


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """The experts modules of a transformers model whose parameters are stacked along the expert.

    They are told by what transformers' `use_experts_implementation` leaves on them, but for the few of `families`.
    """
    parents: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(child, module)
    found = []
    for name, module in model.named_modules():
        if hf.is_experts_module(module) or can_convert(module):
            outer = module
            while isinstance(parent := parents.get(outer), hf.ParamWrapper):
                outer = parent
            count = int(module.num_experts)  # type: ignore[arg-type]
            stacked = tuple(key for key, p in module.named_parameters(recurse=False) if p.shape[:1] == (count,))
            found.append(ExpertsModule(name, module, outer, count, stacked))
    return found


def check_experts(model: nn.Module, ep_size: int) -> list[ExpertsModule]:
    """The experts modules, if they can be sharded over `ep_size` ranks.

    Raises:
        UnsupportedError: a dense model, experts that are not stacked, or a number that `ep_size` does not divide,
            or layers that share a parameter.
    """
    name = type(model).__name__
    found = find_experts(model)
    if not found:
        routers = [key for key, module in model.named_modules() if "Router" in type(module).__name__]
        why = (
            f"the experts that '{routers[0]}' routes to are not the stacked kind that transformers shards over ranks"
            if routers
            else "it is a dense model"
        )
        raise UnsupportedError(
            f"`ep_size` ({ep_size}) needs experts, and {name} has none to shard: {why}. Use ep_size=1."
        )
    for module in found:
        if module.num_experts % ep_size:
            sizes = [str(size) for size in range(1, module.num_experts + 1) if module.num_experts % size == 0]
            raise UnsupportedError(
                f"`ep_size` ({ep_size}) must divide the number of experts ({module.num_experts}) of '{module.name}': "
                f"use {', '.join(sizes)}."
            )
        own = sum(1 for _ in module.experts.parameters(recurse=False))
        if not own or len(module.parameters) != own:
            raise UnsupportedError(
                f"'{module.name}' ({type(module.experts).__name__}) has parameters that are not stacked along its "
                f"{module.num_experts} experts: use ep_size=1."
            )
    _check_unshared(found, ep_size)
    return found


def _check_unshared(found: list[ExpertsModule], ep_size: int) -> None:
    owners: dict[int, str] = {}
    for module in found:
        for key in module.parameters:
            name = f"{module.name}.{key}"
            owner = owners.setdefault(id(getattr(module.experts, key)), name)
            if owner != name:
                raise UnsupportedError(
                    f"'{name}' is the same parameter as '{owner}', and `ep_size` ({ep_size}) shards each layer's "
                    "experts by themselves: use ep_size=1."
                )


def iterate_wrappers(module: ExpertsModule) -> Iterator[Any]:
    """PEFT's wrappers around one experts module, outermost first."""
    layer: Any = module.outer
    while layer is not module.experts:
        yield layer
        layer = layer.base_layer
