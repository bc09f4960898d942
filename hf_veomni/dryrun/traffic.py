"""What this rank sends: every collective that runs, by kind and by the axis of the mesh that it runs over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from hf_veomni.mesh import ParallelState


class Collective(NamedTuple):
    """All calls of one kind over one axis.

    Attributes:
        axis: of the mesh: "fsdp", "sp", "ep", "efsdp", "dp_replicate", "world", or several joined by "x".
        ranks: of the group.
        calls: how many.
        payload: bytes of the full tensors: what an all-gather makes, what a reduce-scatter or an all-to-all takes, and
            what an all-reduce works on.
        sent: bytes that leave this rank in a ring: (n - 1) / n of the payload, twice that of an all-reduce, and of an
            all-to-all all but its own part.
    """

    kind: str
    axis: str
    ranks: int
    calls: int
    payload: int
    sent: int


class _Rule(NamedTuple):
    kind: str
    group: int  # place of the group among the arguments
    payload: Callable[[tuple, Any], Any]  # (arguments, result) -> the tensors of the payload


def _argument(place: int) -> Callable[[tuple, Any], Any]:
    return lambda args, result: args[place]


# Operators of torch.distributed (c10d) and their functional forms, which DTensor uses.
_RULES = {
    "c10d::_allgather_base_": _Rule("all-gather", 2, _argument(0)),
    "c10d::allgather_": _Rule("all-gather", 2, _argument(0)),
    "c10d::_reduce_scatter_base_": _Rule("reduce-scatter", 2, _argument(1)),
    "c10d::allreduce_": _Rule("all-reduce", 1, _argument(0)),
    "c10d::broadcast_": _Rule("broadcast", 1, _argument(0)),
    "c10d::alltoall_base_": _Rule("all-to-all", 2, _argument(1)),
    "_c10d_functional::all_reduce": _Rule("all-reduce", 2, _argument(0)),
    "_c10d_functional::all_gather_into_tensor": _Rule("all-gather", 2, lambda args, result: result),
    "_c10d_functional::reduce_scatter_tensor": _Rule("reduce-scatter", 3, _argument(0)),
    "_c10d_functional::all_to_all_single": _Rule("all-to-all", 3, _argument(0)),
}
_SILENT = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd", "c10d::barrier"}
# Into their first argument, one tensor or a list.
WRITES = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::alltoall_base_", "c10d::allreduce_"}


def _bytes(value: object) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor))


def axis_names(state: ParallelState) -> dict[str, str]:
    """Names of axes by the name of their process group; axes of the same ranks may share one ("fsdp/ep")."""
    found: dict[str, list[str]] = {}
    axes = (
        (state.fsdp_mesh, ("dp_replicate", "fsdp")),
        (state.mesh, ("sp",)),
        (state.expert_mesh, ("dp_replicate", "efsdp", "ep")),
    )
    for mesh, names in axes:
        for name in names:
            if mesh is not None and name in (mesh.mesh_dim_names or ()) and mesh[name].size() > 1:
                known = found.setdefault(mesh[name].get_group().group_name, [])
                known += [name] if name not in known else []
    named = {group: "/".join(names) for group, names in found.items()}
    if state.expert_mesh is not None:
        named.setdefault(state.expert_mesh["efsdp", "ep"]._flatten("experts").get_group().group_name, "experts")
    if dist.group.WORLD is not None:
        named.setdefault(dist.group.WORLD.group_name, "world")
    return named


class TrafficLog:
    """Adds up the collectives that `see` is shown."""

    def __init__(self, axes: dict[str, str]) -> None:
        """`axes`: as `axis_names` makes them; other groups go by their size."""
        self.axes = axes
        self._found: dict[tuple[str, str, int], list[int]] = {}

    def see(self, name: str, args: tuple, result: object) -> None:
        """One call of the operator `name`, after it ran.

        Raises:
            NotImplementedError: a collective that is not in the table of this file.
        """
        if name in _SILENT:
            return
        rule = _RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"The collective '{name}' is not counted: add it to {__name__}.")
        group = args[rule.group]
        if isinstance(group, str):
            resolve: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
            group = resolve(group)
        else:
            group = unbox(group)
        ranks = group.size()
        payload = _bytes(rule.payload(args, result))
        match rule.kind:
            case "all-to-all":
                sent = payload - self._own(name, args, payload, group)
            case "all-reduce":
                sent = 2 * payload * (ranks - 1) // ranks
            case _:
                sent = payload * (ranks - 1) // ranks
        axis = self.axes.get(group.group_name, f"{ranks} ranks")
        entry = self._found.setdefault((rule.kind, axis, ranks), [0, 0, 0])
        for place, value in enumerate((1, payload, sent)):
            entry[place] += value

    @staticmethod
    def _own(name: str, args: tuple, payload: int, group: ProcessGroup) -> int:
        """Bytes of an all-to-all that this rank sends to itself."""
        sizes = args[4] if name == "c10d::alltoall_base_" else args[2]
        rows = args[1 if name == "c10d::alltoall_base_" else 0].shape[0]
        if not sizes or not rows:
            return payload // group.size()
        return payload // rows * sizes[group.rank()]

    def collectives(self) -> list[Collective]:
        """All that was seen, most bytes first."""
        found = [Collective(*key, *values) for key, values in self._found.items()]
        return sorted(found, key=lambda c: -c.sent)


def unbox(group: object) -> ProcessGroup:
    """The process group behind an operator's argument."""
    return group if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group)  # type: ignore[attr-defined]
