"""`pack_dataset`: documents of any kind into rows of at most `max_tokens`, for map-style and streamed datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset

from hf_veomni.data.features import as_shown
from hf_veomni.data.media.lengths import CostFunction, SizeReader
from hf_veomni.data.pipeline import OVERLONG, Packing, Rules
from hf_veomni.data.planning import STRATEGIES
from hf_veomni.data.samples import Meter, SamplePacking, column_names, holds_samples
from hf_veomni.data.text import DOCUMENT_LENGTHS
from hf_veomni.data.text_rows import LOOK_AT, TextPacking, find_features

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
    processor: object = None,
    cost: CostFunction | None = None,
    model_config: object = None,
    item_columns: Sequence[str] = (),
    on_error: str = "raise",
) -> AnyDataset:
    """Pack documents into rows of at most `max_tokens`, each row several complete documents.

    A row of tokenised text holds `input_ids`, `labels` and `position_ids` [T], T <= max_tokens, and `document_lengths`
    [documents of the row]: documents behind each other, positions that restart at 0 with each, and -100 as the first
    label of each. Labels are the column `labels`, else a copy of `input_ids`; padding (`attention_mask` 0) is cut off;
    columns without one number a token are dropped, with one refused unless `columns` names them; empty documents are
    skipped, with a warning. The order of the source is kept as far as packing allows: shuffle it before.

    Samples with images, videos or audio, as a processor makes them or raw for `processor` to read, become rows of
    undecoded `samples`, `document_lengths` and `cost`, which `OmniDataCollatorWithPacking` with the same processor
    decodes when a row is trained on. Their lengths are read from the headers of files.

    Args:
        dataset: a `Dataset`, packed as a whole, or an `IterableDataset`, packed while it is read.
        strategy: "best_fit" (fewest rows) or "sequential" (the order is kept exactly).
        overlong: a document of more than `max_tokens` is an "error", "split" into documents, "truncate"d or "drop"ped.
        columns: further columns of one number a token, packed along.
        num_proc: processes that write the rows of a `Dataset`.
        buffer_size: documents that a stream packs at a time (10,000; 1,000 samples). One row a buffer is not full.
        processor: the model's own, for raw samples (`messages` or `text`, `images`, `audios`), or a tokenizer.
        cost: of the text and items of a sample, such as `CostModel.from_config(config).costs`; default its tokens.
        model_config: tells `cost` the patches of a tile where the processor does not.
        item_columns: further columns that count items, as `OmniDataCollatorWithPacking` takes them.
        on_error: "raise" an error on a file whose header cannot be read, or "skip" its sample and log it.

    Returns:
        A dataset of the same kind, in the same format: for a Trainer, with `OmniDataCollatorWithPacking`.

    Raises:
        ValueError: a document over `max_tokens`, a column of another length than `input_ids`, columns of images, audio
            or video beside it, no token ids, packed already, a transform (`with_transform`), an
            unknown option. Of a stream when it is read.
    """
    _check_options(dataset, max_tokens, strategy, overlong, num_proc, buffer_size)
    if isinstance(dataset, Dataset):
        dataset = as_shown("`dataset`", dataset)
    rules, names = Rules(max_tokens, strategy, overlong), column_names(dataset, LOOK_AT)
    if holds_samples(names, item_columns, processor):
        further = (*((columns,) if isinstance(columns, str) else columns), *item_columns)
        reader = None if processor is None else SizeReader(processor, cost, model_config, further)
        packing: Packing = SamplePacking(rules, names, Meter(reader, cost, on_error), further)
    else:
        packing = TextPacking(rules, find_features(dataset), columns)
    stream = isinstance(dataset, IterableDataset)
    return packing.pack_stream(dataset, buffer_size) if stream else packing.pack(dataset, num_proc)


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


def _check_options(
    dataset: object, max_tokens: int, strategy: str, overlong: str, num_proc: int | None, buffer_size: int | None
):
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


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` ({value!r}) must be a positive integer.")
