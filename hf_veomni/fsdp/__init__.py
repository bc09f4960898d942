"""FSDP2 and HSDP over the plan's meshes."""

from hf_veomni.fsdp.sync import synchronize_parameters
from hf_veomni.fsdp.wrap import shard_parameters

__all__ = ["shard_parameters", "synchronize_parameters"]
