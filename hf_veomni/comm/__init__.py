"""Collectives with their gradients, over an explicit group."""

from hf_veomni.comm.all_to_all import Flight, Transport, all_to_all, exchange, give_way, is_backward, land, launch
from hf_veomni.comm.gather import all_gather, gather_shards

__all__ = [
    "Flight",
    "Transport",
    "all_gather",
    "all_to_all",
    "exchange",
    "gather_shards",
    "give_way",
    "is_backward",
    "land",
    "launch",
]
