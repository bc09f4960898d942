"""What an experts module calls in place of its stock forward: dispatch, compute, combine.

Under activation checkpointing routes are made once:

    forward          routes are made: counts exchanged and read back, tokens sorted
    recomputation    the same routes again: no exchange, no read, no sort

A router whose scores are equal up to rounding could choose otherwise the second time, with sizes that ranks do not
agree on; the order of the forward is kept with the sizes, so that both are always of one choice. What is kept is 8
bytes a (token, expert) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_veomni import hf
from hf_veomni.comm.all_to_all import Flight, give_way, is_backward
from hf_veomni.context import CheckpointCarrier, current, recall, within
from hf_veomni.expert.compute import Groups, LowRank, compute_rows
from hf_veomni.expert.dispatch import (
    Route,
    chunk_sizes,
    combine,
    dispatch,
    land_combine,
    land_dispatch,
    launch_combine,
    launch_dispatch,
    make_routes,
)

_ADAPTERS, _ROWS, _CHUNKS = "_omni_adapters", "_omni_rows", "_omni_chunks"

CHUNKS = 4  # of tokens: the same number on all ranks, whatever their tokens


def is_training_forward(module: nn.Module) -> bool:
    """Whether gradients will come of this forward, and it is not activation checkpointing's second one."""
    return module.training and torch.is_grad_enabled() and not is_backward()


def counting_no_tokens() -> AbstractContextManager[None]:
    """Within this context a model's tokens count neither in its router's loss nor in the load of its experts, and
    what a loss gathers for its log comes from the other data ranks."""
    return within(idle=True)


def counts_tokens() -> bool:
    """Whether the tokens of the running forward count: those of a dummy batch do not."""
    return not current().idle


def start_rows(experts: nn.Module) -> int:
    """Count the rows that this rank computes in training from now on. Returns those counted until now."""
    counted: int = vars(experts).get(_ROWS, 0)
    vars(experts)[_ROWS] = 0
    return counted


def stop_rows(experts: nn.Module) -> None:
    """End what `start_rows` began."""
    vars(experts).pop(_ROWS, None)


class ExpertsForward(hf.EPImplementation):
    """Forward of an experts module: (hidden states [t, C], expert ids [t, K], weights [t, K]) -> [t, C].

    Collectives: see `make_routes`, `dispatch` and `combine`; all ranks of the EP group call it equally often, also
    with no tokens at all.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh | None = None, tp_mesh: DeviceMesh | None = None):
        """Args as transformers passes them; without `ep_mesh` every expert is here."""
        # The base class compares ep_mesh with the tensor-parallel mesh, which is never the same here.
        self.experts, self.experts_forward = experts, experts.forward
        self.group: dist.ProcessGroup | None = ep_mesh.get_group() if ep_mesh is not None else None
        ranks = ep_mesh.size() if ep_mesh is not None else 1
        self.num_experts = int(experts.num_experts) * ranks  # type: ignore[operator]  # the module counts its own

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        adapters: Callable[[], Mapping[str, Sequence[LowRank]]] | None = getattr(self.experts, _ADAPTERS, None)
        active = adapters() if adapters is not None else {}
        own = not active and hf.experts_implementation(self.experts) != "grouped_mm"
        work = partial(compute_rows, self.experts, self.experts_forward if own else None, active)
        chunks = vars(self.experts).get(_CHUNKS, 1)
        made = recall(partial(make_routes, top_k_index, self.num_experts, self.group, chunks))
        routes = list(map(Route.again, made))  # what is kept for a recomputation has nothing derived from it
        if chunks > 1:  # with a group: `cut_into_chunks`
            out, count = self._run_chunks(hidden_states, top_k_weights, routes, work)
        else:
            rows, arrived = dispatch(hidden_states, top_k_weights, routes[0], self.group)
            count = len(rows)
            out = combine(work(rows, routes[0].groups), arrived, top_k_weights, routes[0], self.group)
        if _ROWS in vars(self.experts) and is_training_forward(self.experts):
            vars(self.experts)[_ROWS] += count
        return out.to(hidden_states.dtype)

    def _run_chunks(
        self, x: Tensor, weights: Tensor, routes: list[Route], work: Callable[[Tensor, Groups], Tensor]
    ) -> tuple[Tensor, int]:
        """The exchanges of one chunk of tokens under the experts' work on another, and so in the backward.

            exchange   | to 0 | to 1 | back 0 | to 2 | back 1 | ...
            compute           | experts 0     | experts 1     | ...

        Returns:
            The output [t, C], and rows that were computed here.
        """
        group, sizes = self.group, chunk_sizes(len(x), len(routes))
        assert group is not None
        tokens, parts = x.split(sizes), weights.split(sizes)
        arriving = [launch_dispatch(tokens[0], parts[0], routes[0], group)]
        give_way()
        leaving: list[Flight] = []
        out: list[Tensor] = []
        count = 0
        for chunk, route in enumerate(routes):
            if chunk + 1 < len(routes):
                following = tokens[chunk + 1], parts[chunk + 1], routes[chunk + 1]
                arriving.append(launch_dispatch(*following, group))
            rows, arrived = land_dispatch(arriving[chunk], route)
            count += len(rows)
            leaving.append(launch_combine(work(rows, route.groups), arrived, route, group))  # pyright: ignore[reportCallIssue]
            if chunk:
                out.append(land_combine(leaving[chunk - 1], parts[chunk - 1], routes[chunk - 1]))
        give_way()
        out.append(land_combine(leaving[-1], parts[-1], routes[-1]))
        return torch.cat(out), count


def cut_into_chunks(experts: nn.Module) -> Callable[[], Any]:
    """Have an experts module that `ExpertsForward` runs exchange in chunks of tokens. Returns what undoes it."""
    vars(experts)[_CHUNKS] = CHUNKS
    return partial(vars(experts).pop, _CHUNKS, None)


def set_adapters(experts: nn.Module, adapters: Callable[[], Mapping[str, Sequence[LowRank]]] | None) -> None:
    """Have `ExpertsForward` ask for the active adapters at each call; None ends it."""
    vars(experts).pop(_ADAPTERS, None)
    if adapters is not None:
        vars(experts)[_ADAPTERS] = adapters


class KeepRoutes:
    """Puts the carrier around what checkpoints the layers; checkpointing may be switched on at any time."""

    def __init__(self, model: nn.Module, experts: Iterable[str]) -> None:
        """`experts`: names of the experts modules. A layer around them is checkpointed, or the backbone does it."""
        paths = [name.split(".") for name in experts]
        around = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(len(path)))
        self.around = [model.get_submodule(name) for name in around]
        self.handle = model.register_forward_pre_hook(self.enter)

    def enter(self, model: nn.Module, args: tuple) -> None:
        if model.training:
            hf.wrap_checkpointing(self.around, CheckpointCarrier)

    def remove(self) -> None:
        self.handle.remove()
        hf.restore_checkpointing(self.around, CheckpointCarrier)
