"""FSDP2 and HSDP over the plan's meshes."""

from hf_veomni.fsdp.accumulate import deferred_reduction
from hf_veomni.fsdp.arithmetic import as_plain, sharded_arithmetic
from hf_veomni.fsdp.grad_norm import clip_grad_norm_, mark_stage
from hf_veomni.fsdp.hooks import held_weights
from hf_veomni.fsdp.joint import attach_pairs, check_overlap
from hf_veomni.fsdp.optimizers import check_optimizer
from hf_veomni.fsdp.replaced import check_not_replaced, mark_replaced
from hf_veomni.fsdp.sync import check_same_value, synchronize_parameters
from hf_veomni.fsdp.wrap import check_dtype_can_change, check_units, shard_parameters

__all__ = [
    "as_plain",
    "attach_pairs",
    "check_dtype_can_change",
    "check_not_replaced",
    "check_optimizer",
    "check_overlap",
    "check_same_value",
    "check_units",
    "clip_grad_norm_",
    "deferred_reduction",
    "held_weights",
    "mark_replaced",
    "mark_stage",
    "shard_parameters",
    "sharded_arithmetic",
    "synchronize_parameters",
]
