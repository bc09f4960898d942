"""Collectives with their gradients, over an explicit group."""

from hf_veomni.comm.all_to_all import all_to_all
from hf_veomni.comm.gather import all_gather, gather_shards

__all__ = ["all_gather", "all_to_all", "gather_shards"]
