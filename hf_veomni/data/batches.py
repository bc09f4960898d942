"""What is wrong with a batch of tokens, before a model runs into it on one rank while the others wait for that one.

On a device a token out of range would end the process by an assertion that names nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_veomni import hf
from hf_veomni.host import on_host

_IGNORED = -100
_LABELLED = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "LMHeadModel")


@dataclass(frozen=True)
class BatchRule:
    """What batches must be for a model.

    Attributes:
        vocabulary: rows of the table of embeddings; None if unknown.
        labelled: whether its labels are those of its tokens, one a token: not in an encoder-decoder or a classifier,
            nor where the user's own loss reads them.
        needs_labels: whether they are trained by the model's own loss, which some ranks alone look at.
    """

    vocabulary: int | None
    labelled: bool = True
    needs_labels: bool = False

    @staticmethod
    def of(model: Any, needs_labels: bool = False, own_labels: bool = False) -> BatchRule:
        """`own_labels`: whether they are read by a loss of the user's own, and mean what that says."""
        table = getattr(hf.input_embeddings(model), "weight", None)
        labelled = type(model).__name__.endswith(_LABELLED) and not getattr(model.config, "is_encoder_decoder", False)
        vocabulary = len(table) if isinstance(table, Tensor) else None
        return BatchRule(vocabulary, labelled and not own_labels, needs_labels)


def find_fault(batches: Iterable[Any], rule: BatchRule) -> ValueError | None:
    """The first thing that is wrong with batches of `input_ids` [B, S], or None. Others are asked for labels alone."""
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        if rule.needs_labels and batch.get("labels") is None and batch.get("shift_labels") is None:
            return ValueError(
                "A batch has no `labels`, from which the model computes its loss: add them to the dataset."
            )
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor):
            continue
        message = (
            _wrong_tokens(ids)
            or _wrong_shape(batch, ids, rule.labelled)
            or _wrong_value(batch, ids, rule.vocabulary, rule.labelled)
        )
        if message is not None:
            return ValueError(f"{message}: look at the collator and the dataset.")
    return None


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _wrong_tokens(ids: Tensor) -> str | None:
    if not _is_integer(ids):
        return f"`input_ids` of a batch are {str(ids.dtype).removeprefix('torch.')} and must be integers"
    if ids.dim() < 2:
        return f"`input_ids` {list(ids.shape)} of a batch must have rows and tokens"
    return f"`input_ids` {list(ids.shape)} of a batch hold no token" if ids.numel() == 0 else None


def _is_mask_of(mask: Tensor, rows: int, tokens: int) -> bool:
    """One number a token; or one a pair of tokens, for all rows and heads or for each."""
    if mask.dim() == 2:
        return mask.shape == (rows, tokens)
    return (
        mask.dim() in (3, 4)
        and mask.shape[0] in (1, rows)
        and mask.shape[-1] == tokens
        and (mask.shape[-2] in (1, tokens))
    )


def _wrong_shape(batch: Mapping[str, Any], ids: Tensor, labelled: bool) -> str | None:
    if ids.dim() != 2:
        return None  # choices, or codebooks
    labels, mask, positions = (batch.get(name) for name in ("labels", "attention_mask", "position_ids"))
    if labelled and isinstance(labels, Tensor):
        if labels.shape != ids.shape:
            return f"`labels` {list(labels.shape)} of a batch must have the shape of `input_ids`, {list(ids.shape)}"
        if not _is_integer(labels):
            return f"`labels` of a batch are {str(labels.dtype).removeprefix('torch.')} and must be integers"
    if isinstance(mask, Tensor) and not _is_mask_of(mask, *ids.shape):
        return (
            f"`attention_mask` {list(mask.shape)} of a batch must have the shape of `input_ids`, {list(ids.shape)}, "
            f"or end with {[ids.shape[1]] * 2} where it says which token sees which"
        )
    if isinstance(positions, Tensor):
        rows, tokens = ids.shape
        if positions.dim() not in (2, 3) or positions.shape[-2] not in (1, rows) or positions.shape[-1] != tokens:
            return (
                f"`position_ids` {list(positions.shape)} of a batch must have the shape of `input_ids`, "
                f"{[rows, tokens]}, after an axis of mRoPE if the model has it"
            )
        if not _is_integer(positions):
            return f"`position_ids` of a batch are {str(positions.dtype).removeprefix('torch.')} and must be integers"
    return None


def _wrong_value(batch: Mapping[str, Any], ids: Tensor, vocabulary: int | None, labelled: bool) -> str | None:
    """Of tokens and labels, where the host knows them and no other modality may have placeholders of its own."""
    others = [value for name, value in batch.items() if name != "attention_mask" and isinstance(value, Tensor)]
    if vocabulary is None or any(value.is_floating_point() for value in others):
        return None
    for name, lowest in (("input_ids", 0), *((("labels", _IGNORED),) if labelled else ())):
        values = batch.get(name)
        if not isinstance(values, Tensor) or values.shape != ids.shape or values.is_floating_point():
            continue
        if values.device.type != "cpu" and not hasattr(values, "_host"):
            continue  # a look at it would wait for the device
        known = on_host(values)
        low, high = int(known.min()), int(known.max())
        if low < lowest or high >= vocabulary or (low < 0 and bool(((known < 0) & (known != _IGNORED)).any())):
            rest = ", or -100 where nothing is learned" if name == "labels" else ""
            return f"`{name}` of a batch go from {low} to {high} and must be from 0 to {vocabulary - 1}{rest}"
    return None
