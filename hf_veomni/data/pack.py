"""Packing of tokenised documents into rows of at most `max_tokens`, for map-style and streamed datasets.

Only lengths are looked at first: they are read from the offsets of the arrow columns. The plan is index arithmetic
(`bins.py`); the rows are then written batch after batch from arrow values, never token by token.

n documents, p pieces (a document, or a part of one that was too long), r rows.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets.fingerprint import Hasher

from hf_veomni.data.media.lengths import CostFunction, SizeReader
from hf_veomni.data.pieces import OVERLONG, Pieces, Rules, plan_rows
from hf_veomni.data.planning import STRATEGIES
from hf_veomni.data.sample import ranges_of
from hf_veomni.data.samples import Meter, column_names, holds_samples, pack_samples
from hf_veomni.data.text import (
    DOCUMENT_LENGTHS,
    IGNORE_INDEX,
    Columns,
    flat_values,
    read_columns,
    token_spans,
)

logger = logging.getLogger(__name__)

BUFFER_SIZE = 10_000  # documents that a stream packs at a time
_BATCH_TOKENS = 2**20  # tokens that are assembled at a time: a few megabytes
_SCAN_DOCUMENTS = 16_384
_LOOK_AT = 1000

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def pack_dataset(
    dataset: AnyDataset,
    max_tokens: int,
    strategy: str = "best_fit",
    *,
    overlong: str = "error",
    columns: Sequence[str] = (),
    num_proc: int | None = None,
    buffer_size: int | None = None,
    processor: Any = None,
    cost: CostFunction | None = None,
    model_config: Any = None,
    item_columns: Sequence[str] = (),
    on_error: str = "raise",
) -> AnyDataset:
    """Pack documents into rows of at most `max_tokens`, each row several complete documents.

    Samples with images, videos or audio (columns as the model's processor makes them, or raw ones that `processor`
    is to read) become rows that hold their `samples`, undecoded, `document_lengths` and `cost`, the sum over them:
    lengths are read from the headers of files, and `OmniDataCollatorWithPacking`, with the same processor, decodes a
    row when it is trained on. What follows is about tokenised text.

    A row of the result holds `input_ids`, `labels` and `position_ids` [T], T <= max_tokens, and `document_lengths`
    [documents of the row]. Documents stand behind each other, `position_ids` restart at 0 with each, and the first
    label of each is -100, so that nothing is predicted across a boundary. The result goes to a Trainer as it is, with
    `OmniDataCollatorWithPacking` as its collator. It is deterministic and keeps the order of the source as far as
    packing allows: shuffle with `dataset.shuffle(seed=...)` before.

    Labels are the column `labels` if there is one, else a copy of `input_ids`. Padding at the ends of a document
    (`attention_mask` 0) is cut off. Columns that do not hold one number a token, such as the text, are dropped; a
    column that does is carried if `columns` names it and refused otherwise. Empty documents are skipped with a
    warning that counts them.

    Args:
        dataset: a `datasets.Dataset`, packed as a whole and written with a progress bar (to the cache directory of a
            dataset on disk, else to memory), or a `datasets.IterableDataset`, packed while it is read.
        max_tokens: the largest number of tokens in a row.
        strategy: "best_fit" (best-fit decreasing: fewest rows) or "sequential" (a row is closed when the next
            document does not fit: the order is kept exactly).
        overlong: what becomes of a document with more than `max_tokens`: "error", "split" (into pieces that are
            documents of their own, all but the last of `max_tokens`), "truncate" or "drop" (with a warning).
        columns: further columns of one number a token, packed along.
        num_proc: processes that write the rows of a `Dataset`.
        buffer_size: documents that an `IterableDataset` packs at a time (default 10,000, or 1,000 samples with
            images or audio): what is held in memory. A stream so keeps its shards, its `state_dict` and its
            workers; the price is one row a buffer that is not full.
        processor: the model's own, for raw samples (`messages` or `text`, `images`, `audios`), or a tokenizer.
        cost: of the text and items of a sample, for example `CostModel.from_config(config).costs`; default its tokens.
        model_config: tells `cost` the patches of a tile where the processor does not.
        item_columns: further columns that count items, as `OmniDataCollatorWithPacking` takes them.
        on_error: "raise" an error on a file whose header cannot be read, or "skip" its sample and log count and name.

    Returns:
        A dataset of the same kind, in the same format (`with_format("torch")`, for example).

    Raises:
        ValueError: a document over `max_tokens` (with `overlong="error"`), a column of another length than
            `input_ids`, columns of images, audio or video, a dataset without token ids or already packed, an unknown
            option. Errors of a stream come when it is read.
    """
    _check_options(dataset, max_tokens, strategy, overlong, num_proc, buffer_size)
    names = column_names(dataset, _LOOK_AT)
    if holds_samples(names, item_columns, processor):
        further = (*((columns,) if isinstance(columns, str) else columns), *item_columns)
        reader = None if processor is None else SizeReader(processor, cost, model_config, further)
        rules = Rules(max_tokens, strategy, overlong, names, can_cut=False)
        return pack_samples(dataset, rules, Meter(reader, cost, on_error), num_proc, buffer_size, further)
    if isinstance(dataset, IterableDataset):
        return _pack_stream(dataset, max_tokens, strategy, overlong, columns, buffer_size or BUFFER_SIZE)
    rules = Rules(max_tokens, strategy, overlong, read_columns(dataset.features, columns))
    source = dataset.select_columns(list(rules.columns.read)).with_format("arrow")
    pieces = plan_rows(*_scan(source, rules.columns), rules)
    packed = _write(dataset, source, pieces, rules, num_proc)
    kind = dataset.format["type"]  # a transform of the user's is made for documents, not for packed sequences
    return packed.with_format(None if kind == "custom" else kind)


def unpack(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of one packed sequence, for a look at it.

    Args:
        row: a row of `pack_dataset`, with `document_lengths`; or a batch of `OmniDataCollatorWithPacking`, whose
            documents are found where `position_ids` [1, T] restart.

    Returns:
        One dict a document with its part of every per-token column; columns of items are left out. The first label of
        a document is -100: packing has masked it.
    """
    tokens = {name: np.asarray(value) for name, value in row.items() if name != DOCUMENT_LENGTHS}
    length = tokens["input_ids"].size
    along = {name for name, value in tokens.items() if value.size == length and value.shape[-1] == length}
    tokens = {n: v.reshape(-1, length) for n, v in tokens.items() if n in along or n == "position_ids"}
    if DOCUMENT_LENGTHS in row:
        ends = np.cumsum(np.asarray(row[DOCUMENT_LENGTHS]))[:-1]
    else:
        ends = np.flatnonzero(tokens["position_ids"][0] == 0)[1:]
    parts = {name: np.split(value if len(value) > 1 else value[0], ends, axis=-1) for name, value in tokens.items()}
    return [dict(zip(parts, document, strict=True)) for document in zip(*parts.values(), strict=True)]


def _check_options(dataset: Any, max_tokens: int, strategy: str, overlong: str, num_proc: Any, buffer_size: Any):
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`dataset` ({type(dataset).__name__}) must be a datasets.Dataset or IterableDataset: give one split, or "
            "convert with datasets.Dataset.from_list(samples)."
        )
    _check_positive("max_tokens", max_tokens)
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` ({strategy!r}) must be one of {', '.join(map(repr, STRATEGIES))}.")
    if overlong not in OVERLONG:
        raise ValueError(f"`overlong` ({overlong!r}) must be one of {', '.join(map(repr, OVERLONG))}.")
    if isinstance(dataset, IterableDataset):
        if num_proc is not None:
            raise ValueError(
                f"`num_proc` ({num_proc}) has no effect on an IterableDataset: leave it out and read the packed "
                "stream with dataloader_num_workers."
            )
        if buffer_size is not None:
            _check_positive("buffer_size", buffer_size)
    elif buffer_size is not None:
        raise ValueError(
            f"`buffer_size` ({buffer_size}) has no effect on a Dataset, which is packed as a whole: leave it out, or "
            "give dataset.to_iterable_dataset()."
        )


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")


def _scan(source: Dataset, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of every document, int64 [n] each, from the arrow offsets."""
    spans, first = [], 0
    for table in source.iter(batch_size=_SCAN_DOCUMENTS):
        spans.append(token_spans(table, columns, range(first, first + len(table))))
        first += len(table)
    if not spans:
        raise ValueError("`dataset` has no rows: there is nothing to pack.")
    return np.concatenate([s for s, _ in spans]), np.concatenate([n for _, n in spans])


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
    row_ends = np.cumsum(pieces.row_sizes)
    token_ends = np.cumsum(pieces.lengths)[row_ends - 1]
    arrays = {
        name: _lists(tokens[name].astype(dtype, copy=False), token_ends)
        for name, dtype in columns.types.items()
        if name != DOCUMENT_LENGTHS
    }
    arrays[DOCUMENT_LENGTHS] = _lists(pieces.lengths.astype(columns.types[DOCUMENT_LENGTHS]), row_ends)
    return pa.table(arrays)


def _exclusive_sum(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _lists(values: np.ndarray, ends: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _features(columns: Columns) -> Features:
    return Features({name: datasets.List(Value(dtype)) for name, dtype in columns.types.items()})


def _write(dataset: Dataset, source: Dataset, pieces: Pieces, rules: Rules, num_proc: int | None) -> Dataset:
    """Write the rows of a plan through `Dataset.map`, which brings batches, progress bar, cache and processes."""
    if not len(pieces.row_sizes):
        raise ValueError(f"Nothing is left to pack: none of {len(dataset)} samples has tokens that fit `max_tokens`.")
    rows, tokens = len(pieces.row_sizes), int(pieces.lengths.sum())
    fill = 100 * tokens / (rows * rules.max_tokens)
    logger.info("packing %d documents, %d tokens, into %d rows: %.2f %% full", len(dataset), tokens, rows, fill)
    ends = np.cumsum(pieces.row_sizes)
    plan = Dataset(pa.table({key: _lists(getattr(pieces, key), ends) for key in ("documents", "starts", "lengths")}))
    cache_file, fingerprint = None, uuid.uuid4().hex  # a dataset in memory stays there, and is not looked up again
    if dataset.cache_files and datasets.is_caching_enabled():
        fingerprint = Hasher.hash((dataset, rules))
        cache_file = os.path.join(os.path.dirname(dataset.cache_files[0]["filename"]), f"packed-{fingerprint}.arrow")
    batch_rows = max(1, _BATCH_TOKENS // rules.max_tokens)
    return plan.with_format("arrow").map(
        _write_batch,
        batched=True,
        batch_size=batch_rows,
        writer_batch_size=batch_rows,
        fn_kwargs={"source": source, "columns": rules.columns},
        features=_features(rules.columns),
        cache_file_name=cache_file,
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        desc="Packing",
    )


def _write_batch(plan: pa.Table, source: Dataset, columns: Columns) -> pa.Table:
    documents, row_sizes = flat_values(plan, "documents")
    starts, lengths = flat_values(plan, "starts")[0], flat_values(plan, "lengths")[0]
    wanted, place = np.unique(documents, return_inverse=True)
    if len(wanted) == len(documents):  # in the order of the rows, so that the values need no second gather
        wanted, place = documents, np.arange(len(documents))
    return _assemble(source[wanted], Pieces(place, starts, lengths, row_sizes), columns)


def _pack_stream(
    dataset: IterableDataset,
    max_tokens: int,
    strategy: str,
    overlong: str,
    columns: Sequence[str],
    buffer_size: int,
) -> IterableDataset:
    features = dataset.features
    if features is None:  # a stream without a schema, such as a mapped one: its first samples tell
        features = _look_at(dataset)
    rules = Rules(max_tokens, strategy, overlong, read_columns(features, columns))
    names = list(rules.columns.read)
    return (
        dataset.with_format(None)
        .select_columns(names)
        .map(
            _pack_buffer,
            with_indices=True,
            batched=True,
            batch_size=buffer_size,
            remove_columns=names,
            fn_kwargs={"rules": rules, "kinds": {name: _list_type(features[name]) for name in names}},
            features=_features(rules.columns),
        )
    )


def _look_at(stream: IterableDataset) -> Features:
    sample = None
    for sample in itertools.islice(stream, _LOOK_AT):
        if len(sample.get("input_ids", "?")):  # an empty list has no type
            break
    if sample is None:
        raise ValueError("`dataset` has no samples: there is nothing to pack.")
    return Dataset.from_list([sample]).features


def _pack_buffer(batch: dict[str, list], indices: list[int], rules: Rules, kinds: dict[str, pa.DataType]) -> dict:
    """Pack what a stream has read. Lists of Python on both sides: what a stream is made of, whatever its source."""
    table = pa.table({name: _as_array(name, batch[name], kind, indices) for name, kind in kinds.items()})
    pieces = plan_rows(*token_spans(table, rules.columns, indices), rules, indices)
    if not len(pieces.row_sizes):
        return {name: [] for name in rules.columns.types}
    return _assemble(table, pieces, rules.columns).to_pydict()


def _list_type(feature: Any) -> pa.DataType:
    return pa.list_(Features({"values": feature}).arrow_schema.field("values").type.value_type)


def _as_array(name: str, lists: list, kind: pa.DataType, indices: Sequence[int]) -> pa.Array:
    try:
        if any(isinstance(values, torch.Tensor | np.ndarray) for values in lists):
            lists = [None if values is None else np.asarray(values).tolist() for values in lists]
        return pa.array(lists, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"samples {indices[0]} to {indices[-1]}: `{name}` does not hold {kind}: {error}") from error
