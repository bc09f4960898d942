"""From a plan to meshes and process groups: `ParallelState`."""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_veomni.plan import ParallelPlan

if TYPE_CHECKING:
    from torch import nn


# Of a prepared base model in a pipeline whose first and last stage share a parameter: `Tied`.
TIED = "_omni_tied"


# Of a base model that is the first stage of a pipeline: its encoders.
ENCODERS = "_omni_encoders"


# Of a base model in a pipeline: the names of all its parameters, each tied one under all of its, in the order that
# they had before the cut.
NAMES = "_omni_names"


class Tied(NamedTuple):
    """What embeddings (first stage) and head (last stage) of a pipeline share.

    Attributes:
        names: of each such parameter, all of them, the first one before the others.
        parameters: this stage's copies.
        group: the two ranks that have the same part of them.
    """

    names: tuple[tuple[str, ...], ...]
    parameters: list[Any]
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelState:
    """The meshes and groups of one plan on this rank. It belongs to the models prepared with it, not to the process.

    Attributes:
        plan: the resolved plan.
        device: where this rank's parameters live.
        mesh: dense mesh with axes (pp, dp_replicate, dp_shard, sp); None in a world of one rank.
        fsdp_mesh: for `fully_shard`: 1-D `fsdp` (dp_shard x sp flattened), or 2-D (dp_replicate, fsdp) for HSDP.
        sp_group: the ranks that share this rank's rows, in sequence order; None when sp_size is 1.
        sp_rank: this rank's place on the sequence axis.
        expert_mesh: the same ranks as (dp_replicate, efsdp, ep), ep innermost; None when ep_size is 1.
        dp_rank: which of the `dp_size` streams of rows this rank reads; the same on all ranks of an SP group, and on
            all stages.
        pp_rank: this rank's stage; 0 without a pipeline.
        pp_group, pp_back_group: the ranks with this one's place in each stage, in the order of the stages: for what
            goes forward and for what comes back. None when pp_size is 1.
        pp_wrap_group, pp_wrap_back_group: the same ranks, for what goes from the last rank to the first one's next
            stage and for what comes back from there. None when each rank has one stage.
        stage_group: the ranks of this stage, over which all other axes lie; None (all ranks) when pp_size is 1.
    """

    plan: ParallelPlan
    device: torch.device
    mesh: DeviceMesh | None = None
    fsdp_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    sp_group: dist.ProcessGroup | None = None
    sp_rank: int = 0
    dp_rank: int = 0
    pp_rank: int = 0
    pp_group: dist.ProcessGroup | None = None
    pp_back_group: dist.ProcessGroup | None = None
    pp_wrap_group: dist.ProcessGroup | None = None
    pp_wrap_back_group: dist.ProcessGroup | None = None
    stage_group: dist.ProcessGroup | None = None

    @cached_property
    def sp_size(self) -> int:
        """Ranks that share a sequence."""
        return self.plan.sp_size

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.plan.ep_size

    @property
    def ep_mesh(self) -> DeviceMesh | None:
        """The ranks that share each layer's experts."""
        return None if self.expert_mesh is None else self.expert_mesh["ep"]

    @property
    def efsdp_mesh(self) -> DeviceMesh | None:
        """For `fully_shard` of the experts: 1-D `efsdp`, or 2-D (dp_replicate, efsdp) for HSDP."""
        if self.expert_mesh is None:
            return None
        return (
            self.expert_mesh["dp_replicate", "efsdp"] if self.plan.dp_replicate_size > 1 else self.expert_mesh["efsdp"]
        )

    @cached_property
    def dp_size(self) -> int:
        """Data ranks: groups of ranks that read batches of their own."""
        return self.plan.dp_size

    @cached_property
    def world_size(self) -> int:
        """All ranks of the mesh."""
        return self.plan.world_size


def settle_device() -> None:
    """Make this rank's device the current one, so that no collective of NCCL meets all ranks on the first GPU."""
    if dist.is_initialized():
        _find_device()


def _find_device() -> torch.device:
    """This rank's device in the process group that there is, made the current one.

    The CPU where there is no accelerator, where accelerate was told so (`ACCELERATE_USE_CPU`,
    `Accelerator(cpu=True)`), and where the group reaches nothing else ("cpu:gloo"). Else the accelerator: the one
    that accelerate or the user has set, or else that of `LOCAL_RANK`, as accelerate counts. With gloo several ranks
    may share one device.
    """
    if PartialState._shared_state:
        device = PartialState().device
        if device is not None and (device.type == "cpu" or device.index is not None):
            return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    reached = [pair.partition(":")[0] for pair in dist.get_backend_config().split(",")]
    if accelerator.type not in reached:
        return torch.device("cpu")
    index = torch.accelerator.current_device_index()
    bound: torch.device | None = getattr(dist.group.WORLD, "bound_device_id", None)
    if bound is not None and bound.index is not None:
        index = bound.index
    elif not index:  # 0 is what it is where nobody has set one
        local_rank = dist.get_node_local_rank(fallback_rank=dist.get_rank())  # pyright: ignore[reportPrivateImportUsage]
        index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def _start() -> tuple[torch.device, int]:
    """This rank's device and the world size; joins the process group of a launcher through accelerate if need be."""
    if not dist.is_initialized():
        # Without an accelerator, accelerate joins the CPU ranks of a launcher only when it is told to use the CPU.
        no_device = torch.accelerator.current_accelerator(check_available=True) is None
        state = PartialState(cpu=no_device or parse_flag_from_env("ACCELERATE_USE_CPU"))
        assert state.device is not None
        return state.device, state.num_processes
    return _find_device(), dist.get_world_size()


def _end_gloo() -> None:
    """At the end of the process: nothing of gloo may still run, since its threads abort a process that shuts down.

    A rank goes on as soon as a collective is complete, and a moment later the thread that ran it lets go of its
    tensors, for which it needs the interpreter. Where that comes too late, as on a busy machine, torch ends a job that
    has done all its work with "terminate called without an active exception" (seen with 2.13). Groups that something
    still refers to keep their threads after `destroy_process_group`.
    """
    let_gloo_rest()
    if dist.is_initialized() and dist.get_backend_config().endswith("gloo"):
        dist.destroy_process_group()


def let_gloo_rest(limit: float = 2.0) -> None:
    """Wait until gloo's threads sleep: until each has let go of the last collective that it ran.

    Args:
        limit: seconds after which a thread that still runs, in a collective that others never came to, is left alone.
    """
    deadline, calm = time.monotonic() + limit, 0
    while calm < 2 and time.monotonic() < deadline:
        time.sleep(0.005)  # lets them have the interpreter
        calm = 0 if any(_is_runnable(thread) for thread in Path("/proc/self/task").glob("*/stat")) else calm + 1


def _is_runnable(stat: Path) -> bool:
    """Whether this is a thread of gloo that runs or wants to; not known, and no, where the system is not Linux."""
    try:
        name, state = stat.read_text().split("(", 1)[1].rsplit(") ", 1)
    except OSError:  # it has just ended
        return False
    return name == "pt_gloo_runloop" and not state.startswith("S")


def init_parallel_state(plan: ParallelPlan | str | None = None) -> ParallelState:
    """Resolve the plan for this world and make its meshes. Every rank must call it, in the same order.

    Collectives: creates process groups over all ranks.

    Raises:
        ValueError: the sizes do not multiply to the world size; sizes that this release does not support.
    """
    plan = ParallelPlan.parse(plan)
    device, world_size = _start()
    plan = plan.resolve(world_size)
    if plan.world_size == 1:
        return ParallelState(plan=plan, device=device)
    if device.type == "cpu":
        atexit.unregister(_end_gloo)  # of an earlier plan
        atexit.register(_end_gloo)
    names = ("pp", "dp_replicate", "dp_shard", "sp")
    sizes = (plan.pp_size, plan.dp_replicate_size, plan._resolved_shard(), plan.sp_size)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    # One mesh of its own for parameters, since a flattened axis cannot be combined with dp_replicate in every torch.
    dense = _within_stage(plan, device, dp_replicate=plan.dp_replicate_size, fsdp=plan.fsdp_size)
    expert = None
    if plan.ep_size > 1:
        sizes = {"dp_replicate": plan.dp_replicate_size, "efsdp": plan.efsdp_size, "ep": plan.ep_size}
        expert = _within_stage(plan, device, **sizes)
        expert["efsdp", "ep"]._flatten("experts")  # lets DTensor gather and reduce over both axes in one collective
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    pp_rank, replica, shard, sp_rank = coordinate
    return ParallelState(
        plan=plan,
        device=device,
        mesh=mesh,
        fsdp_mesh=dense if plan.dp_replicate_size > 1 else dense["fsdp"],
        expert_mesh=expert,
        sp_group=mesh.get_group("sp") if plan.sp_size > 1 else None,
        sp_rank=sp_rank,
        dp_rank=replica * plan._resolved_shard() + shard,
        **_stage_groups(plan, device, pp_rank),
    )


def _within_stage(plan: ParallelPlan, device: torch.device, **sizes: int) -> DeviceMesh:
    """A mesh over the ranks of a stage, all of them without a pipeline. Collectives: process groups over all ranks."""
    names = tuple(sizes)
    if plan.pp_size == 1:
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=names)
    whole = init_device_mesh(device.type, (plan.pp_size, *sizes.values()), mesh_dim_names=("pp", *names))
    return whole[names]


def _stage_groups(plan: ParallelPlan, device: torch.device, pp_rank: int) -> dict[str, Any]:
    """What a pipeline needs. Collectives: creates process groups over all ranks."""
    if plan.pp_size == 1:
        return {}
    sizes = (plan.pp_size, plan.world_size // plan.pp_size)
    there = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "stage"))
    ranks = torch.arange(plan.world_size).view(sizes).T.tolist()
    names = ["pp_back_group"] + ["pp_wrap_group", "pp_wrap_back_group"] * (plan.pp_stages > 1)
    more = {name: [dist.new_group(column) for column in ranks][dist.get_rank() % sizes[1]] for name in names}
    return {
        "pp_rank": pp_rank,
        "pp_group": there.get_group("pp"),
        **more,
        "stage_group": there.get_group("stage"),
    }


def get_parallel_state(model: nn.Module) -> ParallelState:
    """The state that `model` was prepared with.

    Raises:
        ValueError: the model was not prepared.
    """
    for module in model.modules():
        state = module.__dict__.get("_omni_parallel_state")
        if state is not None:
            return state
    raise ValueError(f"{type(model).__name__} is not prepared: call `prepare_omni(model, plan)` first.")


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_omni` was called on the model."""
    return any("_omni_parallel_state" in module.__dict__ for module in model.modules())
