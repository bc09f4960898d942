"""Which columns packing reads, carries, drops or refuses, and what it reads from them.

A per-token column holds one number a token: an arrow list of the length of `input_ids`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features

from hf_veomni.data.modalities import UNTOKENISED_COLUMNS
from hf_veomni.errors import UnsupportedError

IGNORE_INDEX = -100  # the label that transformers' losses leave out
DOCUMENT_LENGTHS = "document_lengths"
_READ_NOT_CARRIED = ("attention_mask", "position_ids")


@dataclass(frozen=True)
class Columns:
    """What is read from a source and what a packed sequence is made of.

    Attributes:
        read: the source's columns that packing reads.
        along: per-token columns packed like `input_ids`: `labels` if the source has them, and those asked for.
        types: numpy type name of every column of a packed sequence, `input_ids` first.
    """

    read: tuple[str, ...]
    along: tuple[str, ...]
    types: Mapping[str, str]


def modality_error(name: str) -> ValueError:
    """For a column that text rows cannot carry."""
    return ValueError(
        f"`{name}` belongs to images, audio or video, and cannot be packed beside `input_ids`: give samples of "
        "`messages` or `text` and a `processor`, or what the processor makes of them, or remove it."
    )


def read_columns(features: Features, columns: Sequence[str]) -> Columns:
    """Sort the columns of a source.

    Raises:
        ValueError: no integer lists in `input_ids`, a source that is packed already, an unknown name in `columns`, a
            modality column, or a per-token column that nobody named.
    """
    schema = features.arrow_schema
    types = {field.name: field.type for field in schema}
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    if "input_ids" not in types:
        raise ValueError(f"`dataset` has no column 'input_ids' (it has {', '.join(types)}): tokenise it first.")
    if DOCUMENT_LENGTHS in types:
        raise UnsupportedError(
            f"`dataset` is packed already (it has a column '{DOCUMENT_LENGTHS}'): pack its source instead."
        )
    for name in columns:
        if name not in types or name == "input_ids" or name in _READ_NOT_CARRIED:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean '{near[0]}'? " if near and near[0] != name else ""
            raise ValueError(f"`columns` names '{name}', which cannot be carried: {hint}Columns: {', '.join(types)}.")
    labels = ("labels",) if "labels" in types else ()
    along = (*labels, *(name for name in dict.fromkeys(columns) if name != "labels"))
    for name, kind in types.items():
        _check_column(name, kind, known=name in ("input_ids", *along, *_READ_NOT_CARRIED))
    read = ("input_ids", *along, *(name for name in _READ_NOT_CARRIED if name in types))
    ids = _list_value(types["input_ids"])
    if ids is None or not pa.types.is_integer(ids) or ("labels" in types and not _integers(types["labels"])):
        raise ValueError("`input_ids` and `labels` must hold lists of integers: tokenise the dataset first.")
    signed = "int64" if ids.bit_width == 64 else "int32"
    row = {"input_ids": _numpy_name(types["input_ids"]), "labels": signed, "position_ids": "int32"}
    row |= {name: _numpy_name(types[name]) for name in along if name != "labels"}
    return Columns(read, along, row | {DOCUMENT_LENGTHS: "int32"})


def _check_column(name: str, kind: pa.DataType, known: bool) -> None:
    leaf, depth = kind, 0
    while True:
        if isinstance(leaf, pa.ExtensionType):
            leaf = leaf.storage_type
        inner = _list_value(leaf)
        if inner is None:
            break
        leaf, depth = inner, depth + 1
    is_file = pa.types.is_struct(leaf) and {leaf.field(i).name for i in range(leaf.num_fields)} == {"bytes", "path"}
    if name in UNTOKENISED_COLUMNS or is_file:
        raise modality_error(name)
    is_number = pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf)
    if known and (depth != 1 or not is_number):
        raise ValueError(f"`{name}` ({kind}) must hold one list of numbers a sample, one number a token.")
    if not known and depth and is_number:
        raise ValueError(
            f"`{name}` ({kind}) looks like one number a token, and would be lost: name it in `columns` to pack it "
            f"along, or drop it with dataset.remove_columns('{name}')."
        )


def _list_value(kind: pa.DataType) -> pa.DataType | None:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _numpy_name(kind: pa.DataType) -> str:
    value = _list_value(kind)
    assert value is not None
    return np.dtype(value.to_pandas_dtype()).name


def _integers(kind: pa.DataType) -> bool:
    value = _list_value(kind)
    return value is not None and pa.types.is_integer(value)


def token_spans(table: pa.Table, columns: Columns, names: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of a table lie in their lists, padding cut off.

    Args:
        table: n documents.
        names: what to call them in messages, [n].

    Returns:
        First token and number of tokens of each, int64 [n].

    Raises:
        ValueError: a per-token column of another length than `input_ids`, an `attention_mask` with zeros inside, or
            `position_ids` that do not count from 0. The sample is named.
    """
    lengths = _list_lengths(table, "input_ids", names)
    for name in columns.read[1:]:
        others = _list_lengths(table, name, names)
        if (wrong := np.flatnonzero(others != lengths)).size:
            bad = wrong[0]
            raise ValueError(
                f"sample {names[bad]}: `{name}` has {others[bad]} elements and `input_ids` has {lengths[bad]}; they "
                "must have one each a token."
            )
    starts = np.zeros_like(lengths)
    if "attention_mask" in columns.read:
        starts, lengths = _cut_padding(flat_values(table, "attention_mask")[0], lengths, names)
    if "position_ids" in columns.read:
        _check_positions(table, starts, lengths, names)
    return starts, lengths


def _list_lengths(table: pa.Table, name: str, names: Sequence[int]) -> np.ndarray:
    lengths = pc.call_function("list_value_length", [table.column(name)])
    if lengths.null_count:
        bad = int(lengths.is_null().to_numpy().argmax())
        raise ValueError(f"sample {names[bad]}: `{name}` is missing.")
    return lengths.to_numpy().astype(np.int64)


def flat_values(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The lists of a column behind each other, and the length of each, int64 [n]. Read-only views where possible."""
    column = table.column(name)
    lists = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    values = lists.flatten()
    if values.null_count:
        raise ValueError(f"`{name}` has missing values inside a list: every token needs one.")
    return values.to_numpy(zero_copy_only=False), pc.call_function("list_value_length", [lists]).to_numpy().astype(
        np.int64
    )


def _cut_padding(mask: np.ndarray, lengths: np.ndarray, names: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """First real token and number of real tokens, from flat attention masks."""
    starts = np.zeros_like(lengths)
    if mask.all():
        return starts, lengths
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    real = np.concatenate([[0], np.cumsum(mask != 0)])
    counts = real[bounds[1:]] - real[bounds[:-1]]
    for index in np.flatnonzero(counts != lengths).tolist():
        ones = np.flatnonzero(mask[bounds[index] : bounds[index + 1]])
        starts[index] = ones[0] if ones.size else 0
        if ones.size and ones[-1] - ones[0] + 1 != ones.size:
            raise UnsupportedError(
                f"sample {names[index]}: `attention_mask` has zeros between ones: only padding at the ends of a "
                "document can be cut off."
            )
    return starts, counts


def _check_positions(table: pa.Table, starts: np.ndarray, lengths: np.ndarray, names: Sequence[int]) -> None:
    values, full = flat_values(table, "position_ids")
    first = np.cumsum(full) - full + starts
    counted = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = values[np.repeat(first, lengths) + counted]
    if (wrong := np.flatnonzero(found != counted)).size:
        bad = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise ValueError(
            f"sample {names[bad]}: `position_ids` do not count 0, 1, 2, ...: packing sets its own, so remove the "
            "column; a row of several documents cannot be packed again."
        )
