"""Spread the experts of a stock model over the EP group, through transformers' expert-parallel interface.

    router          weights and ids of this rank's tokens, by the model's own code
    experts         `ExpertsForward` in place of the stock forward: dispatch, compute, combine
      parameters    [E, ...] -> DTensor on the ep axis, this rank's [e, ...] inside the forward

What routes tokens (the router, shared experts, dense layers) is left as it is: every rank runs it on its own tokens,
which are different ones on all ranks of the EP group, be they data or sequence ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_veomni import hf
from hf_veomni.expert.compute import LowRank, compute_as_selected, compute_experts, keep_connected
from hf_veomni.expert.dispatch import combine, dispatch, make_route
from hf_veomni.expert.layout import ExpertsModule

_ADAPTERS = "_omni_adapters"


class ExpertsForward(hf.EPImplementation):
    """Forward of an experts module: (hidden states [t, H], expert ids [t, K], weights [t, K]) -> [t, H].

    Collectives: see `make_route`, `dispatch` and `combine`; all ranks of the EP group call it equally often, also with
    no tokens at all.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh | None = None, tp_mesh: DeviceMesh | None = None):
        """Args as transformers passes them; without `ep_mesh` every expert is here."""
        # The base class compares ep_mesh with the tensor-parallel mesh, which is never the same here.
        self.experts, self.experts_forward = experts, experts.forward
        self.group: dist.ProcessGroup | None = ep_mesh.get_group() if ep_mesh is not None else None
        ranks = ep_mesh.size() if ep_mesh is not None else 1
        self.num_experts = int(experts.num_experts) * ranks  # type: ignore[operator]  # the module counts its own

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        route = make_route(top_k_index, self.num_experts, self.group)
        rows = dispatch(hidden_states, route, top_k_index.shape[-1], self.group)
        count = len(rows)
        rows, local = keep_connected(rows, route)
        adapters: Callable[[], Mapping[str, Sequence[LowRank]]] | None = getattr(self.experts, _ADAPTERS, None)
        active = adapters() if adapters is not None else {}
        if active or hf.experts_implementation(self.experts) == "grouped_mm":
            out = compute_experts(self.experts, rows, local, active)
        else:
            out = compute_as_selected(self.experts_forward, rows, local)
        return combine(out[:count], top_k_weights, route, self.group).to(hidden_states.dtype)


def check_implementation(module: ExpertsModule) -> None:
    """Raises ValueError where the selected kernels exchange tokens themselves."""
    selected = hf.experts_implementation(module.experts)
    if selected == "deepgemm_megamoe":
        raise ValueError(
            f"`experts_implementation` ({selected!r}) of '{module.name}' exchanges tokens inside its kernel and has "
            "no backward: select 'grouped_mm' to train with ep_size > 1."
        )


def attach_experts(model: nn.Module, found: Sequence[ExpertsModule], ep_mesh: DeviceMesh) -> None:
    """Shard the stacked parameters over `ep_mesh` and replace the forwards. It stays: the parameters stay sharded.

    Args:
        found: `check_experts(model, ep_mesh.size())`.

    Collectives: none; every rank keeps its part of what it has, which must be the same on all ranks.
    """
    plan: dict[str, str] = {}
    for module in found:
        check_implementation(module)
        plan.update({f"{module.name}.{name}": "grouped_gemm" for name in module.parameters})
        plan[module.name] = "ep_dispatch_experts"
    hf.apply_expert_plan(model, ep_mesh, plan, ExpertsForward)


def set_adapters(experts: Any, adapters: Callable[[], Mapping[str, Sequence[LowRank]]]) -> None:
    """Have `ExpertsForward` ask for the active adapters at each call."""
    vars(experts)[_ADAPTERS] = adapters
