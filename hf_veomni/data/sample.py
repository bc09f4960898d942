"""One sample of a batch, checked and cut into what a packed sequence is made of.

T: tokens of the sample. A sample is a document, or a text row that `pack_dataset` has packed from several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_veomni.data.modalities import (
    ITEM_COLUMNS,
    RAW_COLUMNS,
    TEXT_COLUMNS,
    TOKEN_COLUMNS,
    item_tensor,
)
from hf_veomni.data.text import DOCUMENT_LENGTHS
from hf_veomni.errors import UnsupportedError

ASSISTANT_MASK = "assistant_masks"
_OPTIONAL = ("labels", ASSISTANT_MASK, *TOKEN_COLUMNS)
_MARKS = ("attention_mask", "position_ids")
READ = ("input_ids", *_OPTIONAL, *_MARKS, DOCUMENT_LENGTHS, *ITEM_COLUMNS)
_KNOWN = frozenset(READ)


@dataclass
class Sample:
    """What a sample adds to a row.

    Attributes:
        where: what to call it in messages.
        lengths: tokens of its documents, int64 [documents], none of them 0.
        tokens: its columns of one number a token, [T] each.
        positions: those that the sample brought, int64 [1 or 4, T].
        items: its columns of items.
    """

    where: str
    lengths: np.ndarray
    tokens: dict[str, np.ndarray]
    positions: np.ndarray | None
    items: dict[str, Tensor]


def read_sample(
    where: str, sample: Mapping[str, Any], columns: Sequence[str] = (), item_columns: Sequence[str] = ()
) -> Sample:
    """Check a sample and bring its columns into one form; [1, T], as a processor returns it, is taken as [T].

    Args:
        columns: further keys of one number a token, which must be there.
        item_columns: further keys of items.

    Raises:
        ValueError: a key that is not known, a column of another length than `input_ids`, padding inside of the
            sample, positions that do not count tokens, or items beside several documents.
    """
    _check_keys(where, sample, columns, item_columns)
    named = ("input_ids", *(name for name in _OPTIONAL if name in sample), *columns)
    tokens = {name: _vector(where, name, sample[name]) for name in named}
    length = len(tokens["input_ids"])
    mask = _vector(where, "attention_mask", sample["attention_mask"]) if "attention_mask" in sample else None
    positions = None
    if sample.get("position_ids") is not None:
        positions = _positions(where, sample["position_ids"])
    _check_length(where, length, tokens, mask, positions)
    if mask is not None and not mask.all():
        kept = _without_padding(where, mask)
        tokens = {name: values[kept] for name, values in tokens.items()}
        positions = positions[:, kept] if positions is not None else None
        length = kept.stop - kept.start
    items = {
        name: item_tensor(where, name, sample[name])
        for name in sample
        if (name in ITEM_COLUMNS or name in item_columns) and sample[name] is not None
    }
    counted = None if positions is None else positions[0]
    lengths = _document_lengths(where, length, sample.get(DOCUMENT_LENGTHS), counted)
    if items and len(lengths) != 1:
        raise UnsupportedError(
            f"{where}: {', '.join(items)} beside {len(lengths)} documents: give each document as a sample of its own."
        )
    return Sample(where, lengths, tokens, positions, items)


def _check_length(
    where: str, length: int, tokens: Mapping[str, np.ndarray], mask: np.ndarray | None, positions: np.ndarray | None
) -> None:
    for name, values in (*tokens.items(), ("attention_mask", mask), ("position_ids", positions)):
        if values is not None and values.shape[-1] != length:
            raise ValueError(
                f"{where}: `{name}` has {values.shape[-1]} elements and `input_ids` has {length}; they must have one "
                "each a token."
            )


def _check_keys(where: str, sample: Mapping[str, Any], columns: Sequence[str], item_columns: Sequence[str]) -> None:
    for name in sample:
        if name in _KNOWN or name in columns or name in item_columns:
            continue
        if name in RAW_COLUMNS or (name in TEXT_COLUMNS and "input_ids" not in sample):
            raise ValueError(
                f"{where} has raw `{name}`"
                + (" beside `input_ids`: remove one of them" if "input_ids" in sample else "")
                + ": give `processor=` and samples of `messages` or `text`, or what the processor makes of them."
            )
        raise ValueError(
            f"{where} has a key `{name}` that cannot be packed: if it holds one number a token name it in `columns`, "
            "if it holds items along its first axis in `item_columns`, else remove it (a Trainer does with "
            "remove_unused_columns=True)."
        )
    for name in ("input_ids", *columns):
        if name not in sample:
            raise ValueError(f"{where}: `{name}` is missing.")


def _numbers(values: object) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    return array if array.size else array.astype(np.int64)


def _vector(where: str, name: str, values: object) -> np.ndarray:
    try:
        array = _numbers(values)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{where}: `{name}` must be one number a token: {error}") from error
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise ValueError(
            f"{where}: `{name}` has shape {array.shape} and type {array.dtype}, and must be one number a token: call "
            "the processor for each sample."
        )
    if array.dtype.kind == "f":
        if name in READ:
            raise ValueError(f"{where}: `{name}` holds {array.dtype}, and must hold integers.")
        return array.astype(np.float32, copy=False)
    return array.astype(np.int64, copy=False)


def _positions(where: str, values: object) -> np.ndarray:
    array = _numbers(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: `position_ids` holds {array.dtype}, and must hold integers.")
    array = array[None] if array.ndim == 1 else array
    return with_text_axis(array, array.shape[-1], f"{where}: `position_ids`")


def _without_padding(where: str, mask: np.ndarray) -> slice:
    ones = np.flatnonzero(mask)
    if not ones.size:
        return slice(0, 0)
    if ones[-1] - ones[0] + 1 != ones.size:
        raise UnsupportedError(
            f"{where}: `attention_mask` has zeros between ones: only padding at the ends of a sample can be cut off."
        )
    return slice(int(ones[0]), int(ones[-1]) + 1)


def _document_lengths(where: str, length: int, given: object, positions: np.ndarray | None) -> np.ndarray:
    """Lengths of the documents of a sample, from what it says of them; without a word it is one document."""
    if not length:
        return np.zeros(0, dtype=np.int64)
    if given is not None:
        lengths = _vector(where, DOCUMENT_LENGTHS, given)
        if (lengths < 1).any() or lengths.sum() != length:
            raise ValueError(
                f"{where}: `{DOCUMENT_LENGTHS}` sum to {lengths.sum()} and `input_ids` has {length} elements; they "
                "must be positive and agree."
            )
    elif positions is not None:
        lengths = np.diff(np.flatnonzero(positions == 0), append=length)
    else:
        lengths = np.array([length])
    if positions is not None and not (lengths.sum() == length and (ranges_of(lengths) == positions).all()):
        raise ValueError(
            f"{where}: `position_ids` must count 0, 1, 2, ... in each document"
            + (f" of `{DOCUMENT_LENGTHS}`" if given is not None else "")
            + ": remove them and they are made here."
        )
    return lengths


def with_text_axis(positions: np.ndarray, length: int, where: str) -> np.ndarray:
    """Positions [axes, 1, T] or [axes, T] with the axis that counts tokens in front: int64 [1 or 4, T]."""
    if positions.ndim == 3 and positions.shape[1] == 1:
        positions = positions[:, 0]
    if positions.ndim != 2 or positions.shape[0] not in (1, 3, 4) or positions.shape[1] != length:
        raise ValueError(
            f"{where} have shape {list(positions.shape)} and must be [1, {length}], [3, 1, {length}] or "
            f"[4, 1, {length}]: give those of one document."
        )
    if len(positions) == 3:
        positions = np.concatenate([np.arange(length)[None], positions])
    return positions.astype(np.int64, copy=False)


def ranges_of(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, ... behind each other: the positions of documents of these lengths."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
