"""The state of a model in pipeline stages, as one: names of all stages on each of them.

A tensor of another stage is on the meta device there, and has its global shape. A parameter that two stages share has
the first of its names, which is the one that a model without stages has too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, pairwise, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.mesh import NAMES, TIED, ParallelState, Tied, get_parallel_state, is_prepared


def stage_of(model: nn.Module) -> ParallelState | None:
    """The state of a model that is a pipeline stage; None for any other."""
    state = get_parallel_state(model) if is_prepared(model) else None
    return state if state is not None and state.plan.pp_size > 1 else None


def leads_stage(state: ParallelState) -> bool:
    """Whether this rank is the first of its stage, of all ranks without a pipeline."""
    return not dist.is_initialized() or dist.get_rank(state.stage_group) == 0


def _shared_names(model: nn.Module) -> dict[str, str]:
    """Name of a parameter here -> its first one, on another stage."""
    tied: Tied | None = getattr(hf.base_model(model), TIED, None)
    own = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False))
    found: dict[str, str] = {}
    for names in () if tied is None else tied.names:
        for name in [name for name in own if ends_with(name, names)]:
            prefix = name.removesuffix(next(n for n in names if ends_with(name, (n,))))
            if prefix + names[0] not in own:
                found[name] = prefix + names[0]
    return found


def global_names(keys: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Key of a state on this stage -> the one that it has without stages.

    Args:
        keys: of weights ("lm_head.weight") or of an optimizer's state ("state.lm_head.weight.exp_avg").
    """
    found = {key: key for key in keys}
    for name, first in _shared_names(model).items():
        for key in found:
            if key == name:
                found[key] = first
            for kind in ("state.", "param_groups."):
                if key.startswith(f"{kind}{name}."):
                    found[key] = f"{kind}{first}.{key.removeprefix(f'{kind}{name}.')}"
    return found


def writes_whole(model: nn.Module) -> bool:
    """Whether this rank writes what is no shard: the first of all ranks, or of its stage."""
    stage = stage_of(model)
    return leads_stage(stage) if stage is not None else not dist.is_initialized() or dist.get_rank() == 0


def _places(model: nn.Module) -> dict[str, int]:
    """Name of a parameter of any stage -> where it came in the order of the whole model's."""
    base: Any = hf.base_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    return {prefix + name: place for place, name in enumerate(getattr(base, NAMES))}


def join_groups(groups: list[list[str]], model: nn.Module) -> list[list[str]]:
    """Names in the parameter groups of an optimizer, with those that the optimizers of other stages have, in the
    order of the whole model's parameters: encoders of the first stage may stand behind layers of others there.

    Collective: an all-gather of names over the stages.

    Raises:
        ValueError: an optimizer has its parameters in another order; on every stage.
    """
    stage = stage_of(model)
    if stage is None:
        return groups
    told: list[Any] = [None] * stage.plan.pp_size
    dist.all_gather_object(told, groups, group=stage.pp_group)
    places = _places(model)
    return [_join_group(parts, places) for parts in zip_longest(*told, fillvalue=())]


def _join_group(parts: Iterable[list[str]], places: dict[str, int]) -> list[str]:
    joined: set[str] = set()
    for part in parts:
        own = [name for name in part if name not in joined]  # tied ones stand elsewhere on the last stage
        for before, after in pairwise(own):
            if places[before] > places[after]:
                raise ValueError(
                    f"The optimizer has '{before}' before '{after}', and the model has them the other way round. The "
                    "file of one process knows parameters by their place alone: give the optimizer of each stage its "
                    "parameters in the order of `model.named_parameters()`."
                )
        joined.update(own)
    return sorted(joined, key=places.__getitem__)


def join_facts(facts: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Each mapping with what the other stages have in theirs. Collective: an all-gather of them over the stages."""
    stage = stage_of(model)
    if stage is None:
        return facts
    told: list[Any] = [None] * stage.plan.pp_size
    dist.all_gather_object(told, facts, group=stage.pp_group)
    return [dict(chain.from_iterable(part.items() for part in parts)) for parts in zip(*told, strict=True)]


def _facts(state: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype] | list[Any]]:
    """What other stages are told: shape and dtype of a tensor, any other value in a list."""
    return {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else [v] for k, v in state.items()}


def share_state(own: Mapping[str, Any], model: nn.Module, *, write: bool = False) -> dict[str, Any]:
    """The state of all stages by name: of this stage its tensors, of others tensors on the meta device.

    Args:
        own: of this stage, with its own names. A model without stages gets it back.
        write: what an earlier stage has too is its to write, and on the meta device here.

    Collective: an all-gather of names and shapes over the stages.
    """
    stage = stage_of(model)
    if stage is None:
        return dict(own)
    names = global_names(own, model)
    mine = {names[key]: value for key, value in own.items()}
    told: list[Any] = [None] * stage.plan.pp_size
    dist.all_gather_object(told, _facts(mine), group=stage.pp_group)
    found: dict[str, Any] = {}
    for place, facts in enumerate(told):
        for name, fact in facts.items():
            if name not in found and (name not in mine or (write and place < stage.pp_rank)):
                value = isinstance(fact, list)
                found[name] = fact[0] if value else torch.empty(fact[0], dtype=fact[1], device="meta")
    return {**{name: value for name, value in mine.items() if name not in found}, **found}


def join_stages(full: dict[str, Tensor], model: nn.Module, state: ParallelState, keep: bool) -> dict[str, Tensor]:
    """Tensors of all stages by name, on rank 0.

    Args:
        full: of this stage, on its first rank.
        keep: whether this is rank 0 and wants them.

    Collectives: among the first ranks of the stages one gather of names and shapes, and a message for each tensor,
    one at a time. On other ranks nothing.
    """
    if not leads_stage(state):
        return {}
    facts: list[Any] = [None] * state.plan.pp_size
    mine = [(name, tuple(value.shape), value.dtype) for name, value in full.items()]
    dist.all_gather_object(facts, mine, group=state.pp_group)
    if state.pp_rank:
        for value in full.values():
            dist.send(value.to(state.device).contiguous(), group=state.pp_group, group_dst=0)
        return {}
    for stage in range(1, state.plan.pp_size):
        for name, shape, dtype in facts[stage]:
            value = torch.empty(shape, dtype=dtype, device=state.device)
            dist.recv(value, group=state.pp_group, group_src=stage)
            if keep:
                full.setdefault(name, value.cpu())
    base: Any = hf.base_model(model)
    tied: Tied | None = getattr(base, TIED, None)
    for names in () if tied is None else tied.names:
        for name in [name for name in full if ends_with(name, names)]:
            prefix = name.removesuffix(next(n for n in names if ends_with(name, (n,))))
            full[name] = full.get(prefix + names[0], full[name])
    return full


def ends_with(name: str, names: tuple[str, ...]) -> bool:
    """Whether a name in the state dict of a model, or of a wrapper around it, is one of the model's `names`."""
    return any(name == each or name.endswith(f".{each}") for each in names)
