"""Shard the experts of a stock model over the EP group, through transformers' expert-parallel interface.

    router          weights and ids of this rank's tokens, by the model's own code
    experts         `ExpertsForward` in place of the stock forward: dispatch, compute, combine
      parameters    [E, ...] -> DTensor on the ep axis, this rank's [e, ...] inside the forward

With adapters on the experts the PEFT wrapper around them is what the layer calls; it goes straight to `experts`.

What routes tokens (the router, shared experts, dense layers) is left as it is: every rank runs it on its own tokens,
which are different ones on all ranks of the EP group, be they data or sequence ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert.families import can_convert, convert
from hf_veomni.expert.forward import ExpertsForward, KeepRoutes
from hf_veomni.expert.layout import ExpertsModule, check_experts, find_experts
from hf_veomni.expert.lora import attach_adapters, check_adapters, has_adapters, stack_adapters
from hf_veomni.mesh import ParallelState


def check_model(model: nn.Module, state: ParallelState) -> list[ExpertsModule]:
    """The experts modules that `attach_experts` will touch.

    Raises:
        UnsupportedError: the plan's `ep_size` does not fit the model, or its kernels or adapters do not.
    """
    found = check_experts(model, state.ep_size) if state.ep_size > 1 else find_experts(model)
    for module in found:
        if state.ep_size > 1 and hf.experts_implementation(module.experts) == "deepgemm_megamoe":
            raise UnsupportedError(
                f"`experts_implementation` ('deepgemm_megamoe') of '{module.name}' exchanges tokens inside its kernel "
                "and has no backward: select 'grouped_mm' to train with ep_size > 1."
            )
        if has_adapters(module) and can_convert(module.experts):
            if state.ep_size > 1:
                raise UnsupportedError(
                    f"LoRA on '{module.name}' ({type(module.experts).__name__}) is not available with ep_size > 1: "
                    "adapt the attention alone (leave `target_parameters` out), or use ep_size=1."
                )
        elif has_adapters(module):
            check_adapters(module)
    if state.ep_size > 1:
        return found
    return [module for module in found if has_adapters(module) and not can_convert(module.experts)]


def attach_experts(
    model: nn.Module, state: ParallelState, undo: list[Callable[[], Any]] | None = None
) -> list[nn.Module]:
    """Shard the experts over the EP group, and compute adapters on them in low rank.

    Args:
        model: the transformers model, its parameters equal on all ranks and not sharded yet.
        undo: gets what takes it off again, in a world of one rank. On several it stays, as the parameters do.

    Returns:
        The modules whose parameters are DTensors on the ep axis now.

    Collectives: none; every rank keeps its part of what it has.
    """
    found, names = check_model(model, state), {module: name for name, module in model.named_modules()}
    plan: dict[str, str] = {}
    for module in found:
        if can_convert(module.experts):
            convert(model.get_submodule(module.name.rpartition(".")[0]), module.experts)
        stacked = stack_adapters(module) if state.world_size > 1 else []
        plan.update({f"{names[module.outer]}.{name}": "grouped_gemm" for name in stacked})
        plan.update({f"{module.name}.{name}": "grouped_gemm" for name in module.parameters})
        plan[module.name] = "ep_dispatch_experts"
    if found:
        keep = KeepRoutes(model, [module.name for module in found])
        if undo is not None and state.world_size == 1:
            undo.append(keep.remove)
    if state.ep_mesh is not None:
        hf.apply_expert_plan(model, state.ep_mesh, plan, ExpertsForward)
    for module in found:
        if has_adapters(module):
            detach = attach_adapters(module)
            if undo is not None and state.world_size == 1:
                undo.append(detach)
    return [module.outer for module in found] if state.ep_mesh is not None else []
