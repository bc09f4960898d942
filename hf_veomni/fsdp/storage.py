"""Parameters whose memory cannot be cut as it is."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from hf_veomni.errors import UnsupportedError


def check_own_storage(model: nn.Module) -> None:
    """Raise UnsupportedError where two parameters are views of the same memory (PEFT's tied adapters).

    In one process a step of the optimizer on either changes both; shards of them would be copies.
    """
    found: dict[tuple[int, int], str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        place = (parameter.untyped_storage()._cdata, int(parameter.storage_offset()))  # fakes have no address
        other = found.setdefault(place, name)
        if other != name:
            raise UnsupportedError(
                f"Parameters '{other}' and '{name}' are two views of the same memory, and shards would not "
                "stay tied: adapt one of the tied layers alone, or leave `ensure_weight_tying` out of the adapter's "
                "config."
            )


def check_no_scalars(model: nn.Module, left: Collection[nn.Parameter]) -> None:
    """Raise UnsupportedError where a parameter has no dimension to shard; those in `left` stay as they are."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0 and parameter not in left:
            raise UnsupportedError(
                f"Parameter '{name}' is a scalar, of which FSDP2 makes no shards: use one rank, or give it the shape "
                "[1] before `prepare_omni`."
            )


def make_contiguous(model: nn.Module) -> None:
    """Lay parameters out row by row, as FSDP2 takes them."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
