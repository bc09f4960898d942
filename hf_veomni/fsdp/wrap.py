"""Shard parameters with FSDP2: transformers' own plan decides the units, our mesh the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.fsdp.dtypes import cast_inputs, split_by_dtype
from hf_veomni.fsdp.hooks import RAN, reshard_after_inference, watch_parts
from hf_veomni.fsdp.storage import check_no_scalars, check_own_storage, make_contiguous
from hf_veomni.fsdp.unused import watch_experts
from hf_veomni.hf import peft as hf_peft
from hf_veomni.mesh import ParallelState

_STYLES = {"free_full_weight": "free", "keep_full_weight": "keep"}


def _stock_units(model: PreTrainedModel) -> dict[str, str]:
    """Module name -> "free" or "keep", from the family's plan, and one unit for each layer that it misses.

    Towers are no units of their own unless rules of the plan say so: they are gathered and reduced with the root.
    """
    skipped = _not_always_run(model)
    styles = hf.fsdp_styles(model) or {}
    units = {n: _STYLES[style] for n, style in styles.items() if model.get_submodule(n) not in skipped}
    names = {module: name for name, module in model.named_modules()}
    layers = getattr(hf.find_backbone(model), "layers", None)
    if getattr(model.config, "sub_configs", None):  # parts that not every row runs
        blocks = list(layers) if isinstance(layers, nn.ModuleList) else []
    else:
        blocks = _blocks(model)
    planned = {module for name in units for module in model.get_submodule(name).modules()}
    for block in blocks:
        if block not in skipped and planned.isdisjoint(block.modules()):
            units[names[block]] = "free"
    return units


def _not_always_run(model: PreTrainedModel) -> set[nn.Module]:
    """A rank whose row has no image does not run their tower, and nobody should have to wait for it there.

    transformers names one tower for each modality, and none of some families (Granite Speech, the second one of
    DeepSeek-VL hybrid): what stands beside the backbone of a model of several parts counts as one, but for an encoder
    that every row of an encoder-decoder runs.
    """
    skipped = {module for tower in hf.towers(model) for module in tower.modules()}
    backbone = hf.find_backbone(model)
    parts = getattr(model.config, "sub_configs", None) and not getattr(model, "merges_full_features", False)
    if not parts or hf.is_encoder_decoder(model) or backbone is model:
        return skipped
    inside = {module for part in (backbone, *hf.heads(model)) for module in part.modules()}
    return skipped | {module for module in model.modules() if inside.isdisjoint(module.modules())}


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model, by what they are: the plan goes by names, and misses `h` and `block`."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [x for items in lists for x in items if hf.is_layer(x) or type(x).__name__ in kinds]
    inside = {child for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if block not in inside]


def _with_tied(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """The modules of a unit, and those outside of it that own one of its parameters too (a tied head).

    Of an owner that lies inside an adapter it is the adapter: that is what the model calls and hands out as its head,
    and the adapter may read the parameter, or call the owner late, on its own.
    """
    owned = {id(p) for module in modules for p in module.parameters()}
    members, inside = set(modules), {child for module in modules for child in module.modules()}
    tied: dict[nn.Module, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(id(p) in owned for p in module.parameters(recurse=False)):
            continue
        path = [model.get_submodule(name[:end]) for end in (*_dots(name), len(name))]
        if members.isdisjoint(path):
            tied[next(filter(hf_peft.is_adapter, path), module)] = None
    return modules + [module for module in tied if module not in inside]


def _dots(name: str) -> Iterator[int]:
    return (place for place, letter in enumerate(name) if letter == ".")


def _joined(groups: list[tuple[list[nn.Module], bool]]) -> list[tuple[list[nn.Module], bool]]:
    """Layers that share parameters in one unit (the attention of Zamba's hybrid layers); others as they are."""
    found: list[tuple[list[nn.Module], bool]] = []
    for modules, keep in groups:
        kind = type(modules[0])
        own = {parameter for module in modules for parameter in module.parameters()}
        partners = [
            (others, style)
            for others, style in found
            if style == keep
            and type(others[0]) is kind
            and not own.isdisjoint(parameter for module in others for parameter in module.parameters())
        ]
        for partner in partners:
            found.remove(partner)
        found.append(([module for others, _ in partners for module in others] + modules, keep))
    return found


def _check_unruled(model: nn.Module, modules: list[nn.Module], rules: Mapping[str, Mapping[str, str]]) -> None:
    names = {name for name, module in model.named_modules() if module in modules}
    for name in sorted(names & rules.keys()):
        if "fsdp" in rules[name]:
            raise UnsupportedError(
                f"The rule `fsdp` for '{name}' has no effect: it shares a parameter with "
                f"{', '.join(sorted(names - {name}))}, and what encoder and decoder of {type(model).__name__} share "
                "is gathered with the root. Leave the rule out."
            )


def plan_units(model: PreTrainedModel, rules: Mapping[str, Mapping[str, str]]) -> list[tuple[list[nn.Module], bool]]:
    """The FSDP units of a model, innermost first: (modules, keep the full weight between forward and backward).

    Modules that keep their weight (final norm and head, which run back to back) share a unit, and tied modules always
    do: a parameter can belong to one unit only. An encoder-decoder keeps what it ties in the root: not all of these
    modules run in each forward, which before torch 2.13 breaks a unit of several.

    Raises:
        UnsupportedError: a rule for such a module.
    """
    units = _stock_units(model)
    units.update({name: rule["fsdp"] for name, rule in rules.items() if "fsdp" in rule})
    stock_keep = [name for name, style in units.items() if style == "keep" and name not in rules]
    ordered = sorted((name for name in units if name not in stock_keep), key=lambda name: -name.count("."))
    groups = [([model.get_submodule(name)], units[name] == "keep") for name in ordered]
    if stock_keep:
        groups.append(([model.get_submodule(name) for name in stock_keep], True))
    groups = _joined(groups)
    taken: set[nn.Module] = set()  # an encoder and a decoder share their embedding, tied adapters their weights
    found: list[tuple[list[nn.Module], bool]] = []
    for modules, keep in groups:
        rest = [module for module in _with_tied(model, modules) if module not in taken]
        taken.update(child for module in rest for child in module.modules())
        if len(rest) > 1 and hf.is_encoder_decoder(model):
            _check_unruled(model, rest, rules)
        elif any(True for module in rest for _ in module.parameters()):  # else it belongs to another pipeline stage
            found.append((rest, keep))
    return found


def check_dtype_can_change(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse to cast parameters whose dtype FSDP2 has noted, at the first forward.

    Raises:
        UnsupportedError: the model is sharded, has run, and has parameters of another dtype.
    """
    base = hf.base_model(model)
    other = next((p.dtype for p in base.parameters() if p.is_floating_point() and p.dtype != dtype), None)
    if other is not None and getattr(base, RAN, False):
        raise UnsupportedError(
            f"`bf16_full_eval` (True) would cast sharded parameters ({other}) to {dtype} after they have been used, "
            "and FSDP2 goes on with that of the first forward: leave it out (`bf16=True` evaluates in bfloat16 too), "
            "or evaluate before training, or evaluate the saved model."
        )


def _expert_placement(size: int) -> Callable[[nn.Parameter], Shard | None]:
    """The dimension along which `size` ranks shard an expert parameter, of which each has complete experts.

    The first one that they divide: along the experts themselves ranks would stay empty once there are more ranks than
    experts on each.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return next((Shard(dim) for dim, length in enumerate(local.shape) if length % size == 0), None)

    return placement


def _shard_experts(experts: Sequence[nn.Module], state: ParallelState, arguments: dict[str, Any]) -> None:
    mesh = state.efsdp_mesh
    assert mesh is not None or not experts
    if mesh is not None:
        arguments = {**arguments, "mesh": mesh, "shard_placement_fn": _expert_placement(state.plan.efsdp_size)}
        if "mp_policy" in arguments:
            # Their layer has cast its inputs; casting once more would take router weights that are fp32 to bf16.
            arguments["mp_policy"] = replace(arguments["mp_policy"], cast_forward_inputs=False)
        for module in experts:
            fully_shard(module, **arguments)


def _prefetch_experts(model: nn.Module, experts: Sequence[nn.Module]) -> None:
    """Gather a layer's parameters while the one before it computes, by name.

    FSDP2 does so by running ahead of the device, which the split sizes that each exchange of tokens reads back stop.
    """
    inner: dict[nn.Module, FSDPModule] = {}  # the innermost unit around each experts module
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            inner.update({child: unit for child in unit.modules() if child in set(experts) - {unit}})
    units: list[list[Any]] = [[inner[module], module] for module in experts]
    for one, other in pairwise(units):
        if one[0] is not other[0]:
            one[0].set_modules_to_forward_prefetch(other)
            other[0].set_modules_to_backward_prefetch(one)


def check_units(model: PreTrainedModel, state: ParallelState) -> None:
    """Raise UnsupportedError for parameters that `shard_parameters` does not take. No collectives."""
    if state.fsdp_mesh is None:
        return
    rules = state.plan.match_modules(name for name, _ in model.named_modules() if name)
    outside = _outside_forward(model)
    check_own_storage(model)
    check_no_scalars(model, outside)
    if state.ep_size == 1:  # else experts become units of their own first
        split_by_dtype([*plan_units(model, rules), ([model], None)], model, outside)


def _outside_forward(model: Any) -> set[nn.Parameter]:
    """Parameters that the forward never reads (`modules_outside_forward` of the model): no unit would gather them."""
    names = getattr(model, "modules_outside_forward", list)()
    return {parameter for name in names for parameter in model.get_submodule(name).parameters()}


def shard_parameters(
    model: PreTrainedModel,
    state: ParallelState,
    mp_policy: MixedPrecisionPolicy | None = None,
    experts: Sequence[nn.Module] = (),
) -> PreTrainedModel:
    """Shard all parameters over `fsdp` (dp_shard x sp), replicated over `dp_replicate`; gradients are averaged.

    Args:
        model: a transformers model with real parameters, the same on all ranks (`synchronize_parameters`).
        experts: modules whose parameters are sharded over the EP group; these are sharded over `efsdp`.
        mp_policy: FSDP2's mixed precision; None computes in the parameters' dtype.

    Returns:
        The same model, its parameters DTensors, but for those of modules that take no part in its forward (the VQ
        models of an `OmniModel`), which stay unsharded. In a world of one rank it is returned as it is.

    Collectives: per unit an all-gather before forward and backward, and a reduce-scatter (plus an all-reduce over the
    replicas) after backward.

    Raises:
        ValueError: a rule of the plan's `modules` that matches nothing; parameters of one module that are trained in
            several dtypes.
    """
    rules = state.plan.match_modules(name for name, _ in model.named_modules() if name)
    if state.fsdp_mesh is None:
        return model
    make_contiguous(model)
    arguments: dict[str, Any] = {"mesh": state.fsdp_mesh}
    if mp_policy is not None:
        arguments["mp_policy"] = mp_policy
    groups: list[tuple[Sequence[nn.Module], bool | None]] = [([module], None) for module in experts]
    units = split_by_dtype([*groups, *plan_units(model, rules), ([model], None)], model, _outside_forward(model))
    _shard_experts(experts, state, arguments)
    for unit in units[len(groups) :]:
        modules = list(unit.modules)
        style: dict[str, Any] = {} if unit.keep is None else {"reshard_after_forward": not unit.keep}
        if mp_policy is not None and (unit.only is not None or unit.keep is None):
            style["mp_policy"] = replace(mp_policy, cast_forward_inputs=False)
        target: Any = modules if len(modules) > 1 else modules[0]
        fully_shard(target, ignored_params=unit.ignored(), **{**arguments, **style})
    if mp_policy is not None and mp_policy.param_dtype is not None and mp_policy.cast_forward_inputs:
        inner = [m for unit in units[len(groups) :] if unit.only is None for m in unit.modules if m is not model]
        cast_inputs(model, inner + list(experts), mp_policy.param_dtype)
    _prefetch_experts(model, experts)
    if not experts:  # those of an expert group have a forward of their own
        watch_experts(model)
    model.register_forward_hook(reshard_after_inference)
    watch_parts(model)
    if hasattr(model, "generate"):  # of an encoder-decoder it calls the encoder before the model
        register_fsdp_forward_method(model, "generate")
    hf.mark_fsdp_managed(model)
    hf.keep_recorders(model)
    return model
