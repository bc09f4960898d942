"""Collectives with their gradients, over an explicit group."""

from hf_veomni.comm.all_to_all import all_to_all
from hf_veomni.comm.gather import gather_shards

__all__ = ["all_to_all", "gather_shards"]
