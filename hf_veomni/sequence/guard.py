"""Checks at the top of a prepared model, before any rank enters a collective."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.context import is_generating
from hf_veomni.errors import UnsupportedError
from hf_veomni.host import on_host
from hf_veomni.mesh import ParallelState


def _check_labels(inputs: Mapping[str, Any], decodes: bool) -> None:
    """`decodes`: whether the labels are those of a decoder's row, beside which an encoder has one of its own."""
    ids, embeds = ("decoder_input_ids", "decoder_inputs_embeds") if decodes else ("input_ids", "inputs_embeds")
    labels, given = inputs.get("labels"), inputs.get(ids)
    given = inputs.get(embeds) if given is None else given
    if isinstance(labels, Tensor) and isinstance(given, Tensor) and labels.shape[:2] != given.shape[:2]:
        raise ValueError(
            f"`labels` {tuple(labels.shape)} must have one entry for each token of the row {tuple(given.shape[:2])}: "
            "give both at full length, unshifted; they are shifted and cut inside the model."
        )


def _is_packed(positions: Any) -> bool:
    return (
        isinstance(positions, Tensor)
        and positions.shape[-1] > 1
        and bool((on_host(positions).diff(dim=-1) != 1).any())
    )


def _is_full(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and bool(on_host(mask).all()))


def _check_router_loss(model: nn.Module, inputs: Mapping[str, Any], reason: str) -> None:
    wanted = inputs.get("output_router_logits")
    if wanted is None:
        wanted = getattr(hf.text_config(model), "output_router_logits", False)
    if wanted and inputs.get("labels") is not None:
        raise UnsupportedError(
            "`output_router_logits` adds a load-balancing loss of this rank's tokens alone at sp_size > 1, which is "
            f"not that of the row ({reason}): set it to False in the config, or use sp_size=1."
        )


def _check_unchanged(model: nn.Module, known: set[str]) -> None:
    new = next((name for name, _ in model.named_parameters() if name not in known), None)
    if new is not None:
        raise UnsupportedError(
            f"Parameter '{new}' came after `prepare_omni`: apply PEFT first and shard the model with its adapters, "
            "which otherwise are neither equal on the ranks nor reduced over them."
        )


def _check_layerdrop(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(drop := getattr(module, "layerdrop", 0), float) and drop > 0:
            raise UnsupportedError(
                f"`layerdrop` ({drop}) of `{name}` lets every rank skip other layers, and then they wait for each "
                "other for ever: set this attribute to 0, or load the model with the config's `layerdrop`, "
                "`encoder_layerdrop` and `decoder_layerdrop` at 0."
            )


def attach_guards(model: PreTrainedModel, state: ParallelState, reasons: Mapping[str, str]) -> Callable[[], None]:
    """Refuse calls that the prepared model would answer wrongly.

    Args:
        reasons: why this model takes no "packed" rows, or computes no loss from "labels" or for its "router" under
            its plan; "full" where its head works on full rows, so that it computes its own loss.

    Returns:
        A function that removes the checks.
    """
    signature = list(inspect.signature(model.forward).parameters)
    known = {name for name, _ in model.named_parameters()}
    checked: set[bool] = set()  # whether they were looked at in training, in evaluation: that takes milliseconds

    def check(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = {**dict(zip(signature, args, strict=False)), **kwargs}
        if "labels" not in reasons:  # other heads have labels of other shapes
            _check_labels(inputs, decodes="decoder_input_ids" in signature)
        if state.world_size > 1 and module.training not in checked:
            _check_unchanged(module, known)
            if module.training:
                _check_layerdrop(module)
            checked.add(module.training)
        if "packed" in reasons and inputs.get("attention_mask") is None and _is_packed(inputs.get("position_ids")):
            raise UnsupportedError(f"Packed sequences would not be kept apart: {reasons['packed']}")
        mask = inputs.get("attention_mask")
        cached = hf.uses_cache(inputs)
        if cached and _is_full(mask) and _is_packed(inputs.get("position_ids")):
            raise UnsupportedError(
                "Packed documents would see each other with `use_cache=True` or `past_key_values`: leave the cache "
                "out, or run the documents one by one."
            )
        if state.sp_size == 1 or is_generating(module):
            return
        if "router" in reasons and not inputs.get("fused_lm_head"):  # of TRL, which computes it itself
            _check_router_loss(module, inputs, reasons["router"])
        if "labels" in reasons and "full" not in reasons and inputs.get("labels") is not None:
            raise UnsupportedError(f"No loss over a cut row: {reasons['labels']}")
        keep = inputs.get("logits_to_keep", 0)
        if cached and inputs.get("labels") is not None:
            raise UnsupportedError(
                "`labels` with `use_cache=True` or `past_key_values` is not available at sp_size > 1: every "
                "rank runs the full row then. Leave the cache out to get a loss."
            )
        if not cached and (isinstance(keep, Tensor) or keep != 0):
            raise UnsupportedError(
                f"`logits_to_keep` ({keep!r}) counts from the end of the full row, which no rank of an SP group "
                "holds: leave it out and slice what `gather_sequence` returns."
            )

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    return handle.remove
