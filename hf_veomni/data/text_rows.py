"""Rows of tokenised text: lengths from the offsets of arrow columns, rows from their values, never token by token."""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from hf_veomni.data.pipeline import Measured, Packing, Pieces, Rules, lists_of
from hf_veomni.data.sample import ranges_of
from hf_veomni.data.text import DOCUMENT_LENGTHS, IGNORE_INDEX, Columns, flat_values, read_columns, token_spans

logger = logging.getLogger(__name__)

LOOK_AT = 1000  # samples of a stream without a schema
_BATCH_TOKENS = 2**20  # tokens that are assembled at a time: a few megabytes
_SCAN_DOCUMENTS = 16_384


class TextPacking(Packing):
    """Documents of one number a token, in every column that is carried."""

    buffer_size = 10_000

    def __init__(self, rules: Rules, features: Features, columns: Sequence[str]) -> None:
        """`features`: of the source; `columns`: further ones that are packed along."""
        super().__init__(rules)
        self.columns = read_columns(features, columns)
        self.kinds = {name: _list_type(features[name]) for name in self.columns.read}

    def select(self, dataset: Dataset) -> Dataset:
        return dataset.select_columns(list(self.columns.read)).with_format("arrow")

    def measure(self, source: Dataset, num_proc: int | None) -> Measured:
        spans, first = [], 0
        for table in source.iter(batch_size=_SCAN_DOCUMENTS):
            spans.append(token_spans(table, self.columns, range(first, first + len(table))))
            first += len(table)
        return Measured(np.concatenate([s for s, _ in spans]), np.concatenate([n for _, n in spans]))

    def write(
        self, dataset: Dataset, source: Dataset, measured: Measured, pieces: Pieces, num_proc: int | None
    ) -> Dataset:
        """By `Dataset.map`, which brings batches, progress bar, cache and processes."""
        rows, tokens, limit = len(pieces.row_sizes), int(pieces.lengths.sum()), self.rules.max_tokens
        fill = 100 * tokens / (rows * limit)
        logger.info("packing %d documents, %d tokens, into %d rows: %.2f %% full", len(dataset), tokens, rows, fill)
        parts = {key: lists_of(getattr(pieces, key), pieces.ends) for key in ("documents", "starts", "lengths")}
        cache_file, fingerprint = None, uuid.uuid4().hex  # a dataset in memory stays there, and is not looked up again
        if dataset.cache_files and datasets.is_caching_enabled():
            fingerprint = Hasher.hash((dataset, self.rules, self.columns))
            folder = os.path.dirname(dataset.cache_files[0]["filename"])
            cache_file = os.path.join(folder, f"packed-{fingerprint}.arrow")
        batch_rows = max(1, _BATCH_TOKENS // limit)
        packed = (
            Dataset(pa.table(parts))
            .with_format("arrow")
            .map(
                _write_batch,
                batched=True,
                batch_size=batch_rows,
                writer_batch_size=batch_rows,
                fn_kwargs={"source": source, "columns": self.columns},
                features=_features(self.columns),
                cache_file_name=cache_file,
                new_fingerprint=fingerprint,
                num_proc=num_proc,
                desc="Packing",
            )
        )
        return packed.with_format(dataset.format["type"])

    def open(self, dataset: IterableDataset) -> tuple[IterableDataset, list[str], Features]:
        names = list(self.columns.read)
        return dataset.with_format(None).select_columns(names), names, _features(self.columns)

    def read(self, batch: dict[str, list[Any]], indices: list[int]) -> pa.Table:
        return pa.table({name: _as_array(name, batch[name], kind, indices) for name, kind in self.kinds.items()})

    def measure_buffer(self, read: pa.Table, indices: list[int]) -> Measured:
        return Measured(*token_spans(read, self.columns, indices))

    def write_buffer(self, read: pa.Table, measured: Measured, pieces: Pieces) -> dict[str, list[Any]]:
        if not len(pieces.row_sizes):
            return {name: [] for name in self.columns.types}
        return _assemble(read, pieces, self.columns).to_pydict()


def find_features(dataset: Dataset | IterableDataset) -> Features:
    """Of a dataset; of a stream without a schema, such as a mapped one, those of its first samples."""
    return _look_at(dataset) if dataset.features is None else dataset.features


def _look_at(stream: Dataset | IterableDataset) -> Features:
    sample = None
    for sample in itertools.islice(stream, LOOK_AT):
        if len(sample.get("input_ids", "?")):  # an empty list has no type
            break
    if sample is None:
        raise ValueError("`dataset` has no samples: there is nothing to pack.")
    return Dataset.from_list([sample]).features


def _assemble(table: pa.Table, pieces: Pieces, columns: Columns) -> pa.Table:
    """Rows from the documents of `table`; `pieces.documents` index into it."""
    tokens: dict[str, np.ndarray] = {}
    take: np.ndarray | None = None
    for name in ("input_ids", *columns.along):
        values, lengths = flat_values(table, name)
        if not tokens:  # the columns have equal lengths: one index serves all of them
            first = (np.cumsum(lengths) - lengths)[pieces.documents] + pieces.starts
            as_it_is = len(values) == pieces.lengths.sum() and bool((first == _exclusive_sum(pieces.lengths)).all())
            take = None if as_it_is else np.repeat(first, pieces.lengths) + ranges_of(pieces.lengths)
        tokens[name] = values if take is None else values[take]
    # A copy, since the values of arrow are read-only, in a type that has room for -100.
    tokens["labels"] = np.array(tokens.get("labels", tokens["input_ids"]), dtype=columns.types["labels"])
    tokens["labels"][_exclusive_sum(pieces.lengths)] = IGNORE_INDEX
    tokens["position_ids"] = ranges_of(pieces.lengths)
    token_ends = np.cumsum(pieces.lengths)[pieces.ends - 1]
    arrays = {
        name: lists_of(tokens[name].astype(dtype, copy=False), token_ends)
        for name, dtype in columns.types.items()
        if name != DOCUMENT_LENGTHS
    }
    arrays[DOCUMENT_LENGTHS] = lists_of(pieces.lengths.astype(columns.types[DOCUMENT_LENGTHS]), pieces.ends)
    return pa.table(arrays)


def _exclusive_sum(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _features(columns: Columns) -> Features:
    return Features({name: datasets.List(Value(dtype)) for name, dtype in columns.types.items()})


def _write_batch(plan: pa.Table, source: Dataset, columns: Columns) -> pa.Table:
    documents, row_sizes = flat_values(plan, "documents")
    starts, lengths = flat_values(plan, "starts")[0], flat_values(plan, "lengths")[0]
    wanted, place = np.unique(documents, return_inverse=True)
    if len(wanted) == len(documents):  # in the order of the rows, so that the values need no second gather
        wanted, place = documents, np.arange(len(documents))
    return _assemble(source[wanted], Pieces(place, starts, lengths, row_sizes), columns)


def _list_type(feature: object) -> pa.DataType:
    return pa.list_(Features({"values": feature}).arrow_schema.field("values").type.value_type)


def _as_array(name: str, lists: list, kind: pa.DataType, indices: Sequence[int]) -> pa.Array:
    try:
        if any(isinstance(values, torch.Tensor | np.ndarray) for values in lists):
            lists = [None if values is None else np.asarray(values).tolist() for values in lists]
        return pa.array(lists, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"samples {indices[0]} to {indices[-1]}: `{name}` does not hold {kind}: {error}") from error
