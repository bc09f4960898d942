"""Full tensors of all stages of a pipeline, where they are put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import TIED, ParallelState, Tied, get_parallel_state, is_prepared


def stage_of(model: nn.Module) -> ParallelState | None:
    """The state of a model that is a pipeline stage; None for any other."""
    state = get_parallel_state(model) if is_prepared(model) else None
    return state if state is not None and state.plan.pp_size > 1 else None


def check_unstaged(model: nn.Module, what: str) -> None:
    """Raises UnsupportedError for a model that is a pipeline stage. `what`: is not there for it, in words."""
    if (state := stage_of(model)) is not None:
        raise UnsupportedError(
            f"{what} is not available with `pp_size` ({state.plan.pp_size}), where each stage has names of its own: "
            "`save_pretrained` or `save_model` write the full model, and `prepare_omni(..., checkpoint=...)` reads it."
        )


def leads_stage(state: ParallelState) -> bool:
    """Whether this rank is the first of its stage."""
    return dist.get_rank(state.stage_group) == 0


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
