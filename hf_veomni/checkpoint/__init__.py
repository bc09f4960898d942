"""Saving and loading: plain formats for others, sharded state for resuming."""

from hf_veomni.checkpoint.background import BackgroundError, BackgroundWriter
from hf_veomni.checkpoint.files import naming_damage, staged
from hf_veomni.checkpoint.load import PendingWeights, check_parameters, materialize_weights, retain_weights
from hf_veomni.checkpoint.plain import check_adapters, gather_full_state, gather_plain_state, load_plain, save_plain
from hf_veomni.checkpoint.stages import share_state, writes_whole
from hf_veomni.checkpoint.state import (
    fit_groups,
    load_optimizer,
    load_stock_optimizer,
    load_weights,
    optimizer_state,
    save_optimizer,
    save_weights,
    unwrap_optimizer,
    weights_state,
)
from hf_veomni.checkpoint.stock_calls import attach_stock_calls
from hf_veomni.comm.agree import agree, together

__all__ = [
    "BackgroundError",
    "BackgroundWriter",
    "PendingWeights",
    "retain_weights",
    "agree",
    "attach_stock_calls",
    "check_adapters",
    "check_parameters",
    "fit_groups",
    "gather_full_state",
    "gather_plain_state",
    "load_optimizer",
    "load_plain",
    "load_stock_optimizer",
    "load_weights",
    "materialize_weights",
    "naming_damage",
    "optimizer_state",
    "save_optimizer",
    "save_plain",
    "save_weights",
    "share_state",
    "staged",
    "together",
    "unwrap_optimizer",
    "weights_state",
    "writes_whole",
]
