"""FSDP2 and HSDP over the plan's meshes."""

from hf_veomni.fsdp.grad_norm import clip_grad_norm_
from hf_veomni.fsdp.sync import synchronize_parameters
from hf_veomni.fsdp.wrap import shard_parameters

__all__ = ["clip_grad_norm_", "shard_parameters", "synchronize_parameters"]
