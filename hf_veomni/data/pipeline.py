"""The one way from documents to rows, whatever they hold: measure, plan, write.

    measure    the tokens of each document, from offsets of arrow columns or from the headers of files
    plan       which part of which document goes into which row: index arithmetic
    write      the rows, batch after batch; of a stream, buffer after buffer

n documents, p pieces (a document, or a part of one that was too long), r rows.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset

from hf_veomni.data.planning import STRATEGIES, members
from hf_veomni.data.sample import ranges_of

logger = logging.getLogger(__name__)

OVERLONG = ("error", "split", "truncate", "drop")
LEFT_OUT = -1  # tokens of a document that cannot be read


@dataclass(frozen=True)
class Rules:
    """What `pack_dataset` was asked for; `can_cut` is False where documents hold images or audio."""

    max_tokens: int
    strategy: str
    overlong: str
    can_cut: bool = True


@dataclass(frozen=True)
class Measured:
    """What is known of the documents before any is packed.

    Attributes:
        starts, lengths: first token and number of tokens, int64 [n]; `LEFT_OUT` tokens where it cannot be read.
        costs: float64 [n], of documents that are more than their tokens.
        reasons: why documents are left out.
    """

    starts: np.ndarray
    lengths: np.ndarray
    costs: np.ndarray | None = None
    reasons: Sequence[str] = ()


@dataclass(frozen=True)
class Pieces:
    """Pieces row after row: the document [p], first token in it [p] and tokens [p] of each; pieces of a row [r]."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_sizes: np.ndarray

    @property
    def ends(self) -> np.ndarray:
        """Where the pieces of each row end, int64 [r]."""
        return np.cumsum(self.row_sizes)

    def rows(self) -> list[np.ndarray]:
        """The places of each row's pieces."""
        return np.split(np.arange(len(self.documents)), self.ends[:-1]) if len(self.row_sizes) else []


class Packing(ABC):
    """One kind of document: what is measured and written. All else is the same for every kind."""

    buffer_size: int  # documents that a stream packs at a time

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def pack(self, dataset: Dataset, num_proc: int | None) -> Dataset:
        """Rows of a dataset, which is planned as a whole."""
        source = self.select(dataset)
        if not len(source):
            raise ValueError("`dataset` has no rows: there is nothing to pack.")
        measured = self.measure(source, num_proc)
        pieces = plan_rows(measured, self.rules)
        if not len(pieces.row_sizes):
            raise ValueError(
                f"Nothing is left to pack: none of {len(dataset)} samples has tokens that fit `max_tokens`."
            )
        return self.write(dataset, source, measured, pieces, num_proc)

    def pack_stream(self, dataset: IterableDataset, buffer_size: int | None) -> IterableDataset:
        """Rows of a stream, of which a buffer is planned at a time, while it is read."""
        stream, names, features = self.open(dataset)
        return stream.map(
            self.pack_buffer,
            with_indices=True,
            batched=True,
            batch_size=buffer_size or self.buffer_size,
            remove_columns=names,
            features=features,
        )

    def pack_buffer(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Lists of Python on both sides: what a stream is made of, whatever its source."""
        read = self.read(batch, indices)
        measured = self.measure_buffer(read, indices)
        return self.write_buffer(read, measured, plan_rows(measured, self.rules, indices))

    @abstractmethod
    def select(self, dataset: Dataset) -> Dataset:
        """The columns of a dataset that rows are made of."""

    @abstractmethod
    def measure(self, source: Dataset, num_proc: int | None) -> Measured:
        """Tokens and cost of each document of a dataset, and why documents are left out."""

    @abstractmethod
    def write(
        self, dataset: Dataset, source: Dataset, measured: Measured, pieces: Pieces, num_proc: int | None
    ) -> Dataset:
        """`source` is what was selected of `dataset`."""

    @abstractmethod
    def open(self, dataset: IterableDataset) -> tuple[IterableDataset, list[str], Features | None]:
        """A stream of what rows are made of, its columns, and those of rows where they are known."""

    @abstractmethod
    def read(self, batch: dict[str, list[Any]], indices: list[int]) -> Any:
        """A buffer of documents, as the next two take it."""

    @abstractmethod
    def measure_buffer(self, read: object, indices: list[int]) -> Measured:
        """The same for a buffer of a stream; `indices` name its documents in messages."""

    @abstractmethod
    def write_buffer(self, read: object, measured: Measured, pieces: Pieces) -> dict[str, list[Any]]:
        """The rows of a buffer, as columns."""


def plan_rows(measured: Measured, rules: Rules, names: Sequence[int] | None = None) -> Pieces:
    """Decide which piece goes into which row. `names`: what to call the documents in messages, default 0..n-1."""
    if measured.reasons:
        shown = "; ".join(measured.reasons[:3]) + (" ..." if len(measured.reasons) > 3 else "")
        total = len(measured.lengths)
        logger.warning("skipped %d samples of %d that cannot be read: %s", len(measured.reasons), total, shown)
    kept = np.flatnonzero(measured.lengths != LEFT_OUT)
    named = kept if names is None else np.asarray(names)[kept]
    documents, starts, lengths = _fit(measured.starts[kept], measured.lengths[kept], rules, named)
    order, row_sizes = members(STRATEGIES[rules.strategy](lengths, rules.max_tokens))
    return Pieces(kept[documents[order]], starts[order], lengths[order], row_sizes)


def lists_of(values: np.ndarray, ends: np.ndarray) -> pa.Array:
    """An arrow list for each of the `ends`."""
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _fit(
    starts: np.ndarray, lengths: np.ndarray, rules: Rules, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut or leave out documents until each piece has 1 to max_tokens tokens: document, first token, length, [p]."""
    limit = rules.max_tokens
    documents = np.arange(len(lengths))
    empty, over = lengths == 0, lengths > limit
    if empty.any():
        logger.warning("skipped %d empty documents, the first is sample %d", empty.sum(), names[int(empty.argmax())])
    if over.any():
        worst = int(over.argmax())
        if rules.overlong == "error":
            raise ValueError(
                f"sample {names[worst]} has {lengths[worst]} tokens, more than `max_tokens` ({limit}), and "
                f"{int(over.sum()) - 1} more are too long: raise `max_tokens`, or choose overlong="
                + ("'split', 'truncate' or 'drop'." if rules.can_cut else "'drop'.")
            )
        if rules.overlong == "drop":
            logger.warning("dropped %d documents of more than %d tokens", over.sum(), limit)
            empty = empty | over
        elif rules.overlong == "truncate":
            lengths = np.minimum(lengths, limit)
    counts = np.where(empty, 0, -(-lengths // limit))  # pieces of each document: 1 unless it is split
    documents = np.repeat(documents, counts)
    offset = limit * ranges_of(counts)
    return documents, starts[documents] + offset, np.minimum(lengths[documents] - offset, limit)
