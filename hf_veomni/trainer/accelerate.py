"""`OmniParallelismConfig`: tells accelerate about a plan. This file holds what we know of accelerate's private side.

Verified against accelerate 1.15. SP travels in the mesh dimension that accelerate calls "cp": its data loaders hand
the ranks along "cp" the same batch, while "sp" means DeepSpeed there. `cp_enabled` stays False, so that none of
accelerate's own context parallelism starts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, DynamoBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.require import override, require_overrides
from hf_veomni.plan import ParallelPlan
from hf_veomni.trainer.adapt import adapt_accelerator
from hf_veomni.trainer.validation import release_launcher

if TYPE_CHECKING:
    from accelerate import Accelerator

_AXES = ("dp_replicate", "dp_shard", "cp")


class OmniParallelismConfig(ParallelismConfig):
    """An accelerate ParallelismConfig for `Accelerator(parallelism_config=...)` and the Trainer.

    With it an Accelerator takes a model that `prepare_omni` sharded: data ranks get batches of their own and the ranks
    of an SP group the same ones, `gather`, `gather_for_metrics` and `reduce` count each row once, `num_processes` (by
    which loops scale losses and schedules) and `split_between_processes` go by data ranks, `accumulate`,
    `clip_grad_norm_`, `get_state_dict`, `save_model`, `save_state` and `load_state` work on the sharded parameters.

    Args:
        plan: whatever `ParallelPlan.parse` takes; None reads what the launcher passed on.

    Raises:
        ValueError: the plan does not fit the world, or the launcher asks for something else.
    """

    cp_enabled = False  # pyright: ignore (a property there)

    def __init__(self, plan: ParallelPlan | str | None = None) -> None:
        self.plan = ParallelPlan.parse(plan)
        release_launcher(self.plan)
        self.cp_backend, self.sp_backend = "torch", "deepspeed"  # the values that mean nothing is asked for
        self.tp_size = self.sp_size = 1
        self.tp_handler = self.cp_handler = self.sp_handler = None
        self.data_group: dist.ProcessGroup | None = None
        self._take_sizes()

    def _take_sizes(self) -> None:
        self.dp_replicate_size = self.plan.dp_replicate_size
        self.dp_shard_size = self.plan.dp_shard_size or 1
        self.cp_size: Any = self.plan.sp_size
        sizes = (self.dp_replicate_size, self.dp_shard_size, self.cp_size)
        self._sizes = {**dict(zip(_AXES, sizes, strict=True)), "tp": 1, "sp": 1}

    def __repr__(self) -> str:
        return f"OmniParallelismConfig(plan={str(self.plan)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without mesh and group, which belong to this process: Trainer pickles its arguments."""
        return {k: v for k, v in self.__dict__.items() if k not in ("device_mesh", "data_group")} | {
            "data_group": None
        }

    @override
    def to_json(self) -> dict[str, Any]:
        return self.plan.to_dict()

    @property
    @override
    def non_dp_dim_names(self) -> list[str]:
        return ["cp"] if self.plan.sp_size > 1 else []

    @property
    @override
    def dp_shard_cp_dim_names(self) -> list[str]:
        return (["dp_shard"] if self.dp_shard_enabled else []) + self.non_dp_dim_names

    @property
    @override
    def dp_cp_dim_names(self) -> list[str]:
        return self.dp_dim_names + self.non_dp_dim_names

    @override
    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Mesh (dp_replicate, dp_shard, cp) of all ranks; None in a world of one rank.

        Collectives: creates process groups over all ranks.
        """
        self.plan = self.plan.resolve(dist.get_world_size() if dist.is_initialized() else 1)
        self._take_sizes()
        if self.plan.world_size == 1:
            return None
        sizes = (self.plan.pp_size, *(self._sizes[axis] for axis in _AXES))
        # The stages read the same batches, and accelerate is to see those of one of them.
        pp = ("pp",) if self.plan.pp_size > 1 else ()
        mesh = init_device_mesh(device_type, sizes[1 - len(pp) :], mesh_dim_names=(*pp, *_AXES))
        if self.plan.dp_size > 1:
            self.data_group = mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        return mesh[_AXES] if pp else mesh

    @override
    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """Called at the end of accelerate's state setup: check the fit, then adapt this one Accelerator."""
        if accelerator.num_processes != self.plan.world_size:
            raise ValueError(
                f"The plan ({self.plan}) is for {self.plan.world_size} ranks, but accelerate sees "
                f"{accelerator.num_processes}: on a machine without accelerator use Accelerator(cpu=True) or "
                "`use_cpu: true` in the launcher's yaml."
            )
        kind = accelerator.distributed_type
        owned = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
        # An Accelerator that is handed a plugin exports the switch again, on the CPU too, where it has no effect.
        if kind in owned or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UnsupportedError(
                f"Accelerator was given a plugin for {kind.value if kind in owned else 'FSDP'}, but the plan "
                f"({self.plan}) shards the model: leave the plugin out."
            )
        dynamo: Any = accelerator.state.dynamo_plugin
        if dynamo.backend != DynamoBackend.NO:
            raise UnsupportedError(
                f"`dynamo_plugin` ({dynamo.backend.value}) would put another module around the model of the plan "
                f"({self.plan}): leave it out (also `dynamo_backend` of the launcher) and call "
                "`compile_layers(model)`, or give `torch_compile=True` to OmniTrainingArguments."
            )
        adapt_accelerator(accelerator, self.plan, self.data_group)


require_overrides(OmniParallelismConfig)
