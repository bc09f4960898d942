"""Positions and mask that the backbone is called with, of the full row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_veomni.errors import UnsupportedError
from hf_veomni.host import apply, on_host, remember, with_values
from hf_veomni.sequence.checks import check_text_positions, restarts


def find_positions(given: Any, like: Tensor, mask: Any, config: Any) -> Tensor:
    """`position_ids` as given, with their values on the host, or those that count the tokens of `like` [B, S, ...]."""
    if given is not None:
        found = with_values(given, on_host(given))  # waits for the device here, or not at all
        check_text_positions(found, mask)
        return found
    found = remember(torch.arange(like.shape[1])[None], like.device)
    if "mrope_section" in str(getattr(config, "rope_parameters", None)):  # whose own default has all rows
        found = apply(Tensor.expand, found, like.shape[0], -1)
    return found


def prepare_mask(
    inputs: dict[str, Any], like: Tensor, *, name: str, fill: bool, on_demand: bool, takes_mask: bool, sp_size: int
) -> Any:
    """Put the `attention_mask` of the full row into `inputs`; returns the one that tells tokens of a user apart.

    Args:
        inputs: holds `position_ids`.
        like: [B, S, ...].
        fill: rows are to be filled up to a multiple of `sp_size` that all tokens would see.
        on_demand: the model attends otherwise with a mask than without one.
        takes_mask: the backbone's forward has an `attention_mask`.

    Raises:
        UnsupportedError: rows to be filled up of a model that would attend otherwise with the mask that this takes.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == like.shape[:2]:
        inputs["attention_mask"] = mask = with_values(mask, on_host(mask))
        if bool(on_host(mask).all()) and not on_demand:
            inputs["attention_mask"] = mask = None  # an all-ones mask would switch stock packing off
    if fill and mask is None and takes_mask:
        if on_demand:
            raise UnsupportedError(
                f"{name} attends otherwise with an `attention_mask` than without one, so a row of {like.shape[1]} "
                f"tokens cannot be filled up to a multiple of {sp_size}: pass a mask."
            )
        if not restarts(inputs["position_ids"]):
            inputs["attention_mask"] = remember(torch.ones(like.shape[:2], dtype=torch.long), like.device)
    return mask
