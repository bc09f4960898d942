"""Packed sequences of samples with images, videos and audio: packing looks at lengths, reading a row reads the rest.

A row names its documents; their samples, undecoded, are fetched with it, and `OmniDataCollatorWithPacking` makes the
one packed sequence of them, in the workers of a loader. So nothing is decoded twice and no pixel is written to disk
again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value

from hf_veomni.data.features import read_json, undecoded
from hf_veomni.data.media.decode import BrokenItemError
from hf_veomni.data.media.lengths import CostFunction, Size, SizeReader
from hf_veomni.data.media.skips import check_on_error
from hf_veomni.data.modalities import AUDIO_MASKS, GRIDS, ITEM_COLUMNS, RAW_COLUMNS, TEXT_COLUMNS, is_raw
from hf_veomni.data.pipeline import LEFT_OUT, Measured, Packing, Pieces, Rules, lists_of
from hf_veomni.data.sample import READ
from hf_veomni.data.text import DOCUMENT_LENGTHS
from hf_veomni.errors import UnsupportedError

SAMPLES, DOCUMENTS, COST = "samples", "documents", "cost"
ROW_COLUMNS = (SAMPLES, DOCUMENTS, COST)
_MEASURED_AT_ONCE = 256


def holds_samples(names: Sequence[str], item_columns: Sequence[str], processor: object) -> bool:
    """Whether the columns of a dataset ask for rows of samples: items, or text for a processor."""
    items = any(name in ITEM_COLUMNS or name in item_columns for name in names)
    raw = any(name in RAW_COLUMNS for name in names)
    if "input_ids" in names:  # beside raw columns: some samples are tokenised, others not
        return items or (raw and processor is not None)
    text = any(name in TEXT_COLUMNS for name in names)
    return items or raw or (processor is not None and text)


@dataclass
class Meter:
    """Tokens and cost of samples, raw or processed.

    Attributes:
        reader: of raw samples; None without a processor.
        cost: as `SizeReader` takes it.
        on_error: "raise" or "skip" samples with a broken item.
        features: of the table that it is called with.
    """

    reader: SizeReader | None
    cost: CostFunction | None
    on_error: str
    features: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, where: str, sample: Mapping[str, Any]) -> Size | str:
        """Size of a sample, or why it is skipped."""
        if not is_raw(sample):
            return self._processed(where, sample)
        if self.reader is None:
            raise ValueError(
                f"{where} is raw (it has {', '.join(sample)}): give `processor=`, the model's own, or run it first "
                "(dataset.map) and pack what it makes."
            )
        try:
            return self.reader.measure(where, sample)
        except BrokenItemError as error:
            if self.on_error == "raise":
                raise
            return str(error)

    def __call__(self, table: pa.Table, indices: list[int]) -> pa.Table:
        """A batch for `Dataset.map`: tokens, cost and reason to skip of each."""
        samples = [_plain(read_json(self.features, sample)) for sample in table.to_pylist()]
        found = [self.measure(f"sample {i}", sample) for i, sample in zip(indices, samples, strict=True)]
        return pa.table(
            {
                "tokens": pa.array([s.tokens if isinstance(s, Size) else LEFT_OUT for s in found], pa.int64()),
                "cost": pa.array([s.cost if isinstance(s, Size) else 0.0 for s in found], pa.float64()),
                "reason": pa.array([s if isinstance(s, str) else "" for s in found], pa.string()),
            }
        )

    def _processed(self, where: str, sample: Mapping[str, Any]) -> Size:
        if "input_ids" not in sample:
            raise ValueError(
                f"{where} has no `input_ids`, `messages`, `text`, `conversations` or `prompt` (but {list(sample)}): "
                "convert it with dataset.map, or remove it."
            )
        ids = np.asarray(sample["input_ids"])
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise ValueError(f"{where}: `input_ids` has shape {list(ids.shape)}, and must be one list of integers.")
        mask = sample.get("attention_mask")
        length = len(ids) if mask is None else int(np.count_nonzero(mask))
        if self.cost is None:
            return Size(length, float(length))
        modalities, patches, segments = ["text"], [length], [1]
        for modality, name in GRIDS.items():
            for grid in np.asarray(sample.get(name, ())).reshape(-1, 3).tolist():
                modalities.append(modality)
                patches.append(int(np.prod(grid)))
                segments.append(grid[0] if modality == "video" else 1)
        frames = next((sample[name] for name in AUDIO_MASKS if sample.get(name) is not None), ())
        for one in frames:
            modalities.append("audio")
            patches.append(int(np.sum(one)) // 2)  # Whisper's convolutions halve the mel frames
            segments.append(1)
        return Size(length, float(np.sum(self.cost(modalities, patches, segments))))


@dataclass
class _Fetch:
    """The transform of a packed dataset: from the numbers of documents to their samples, undecoded."""

    source: Dataset
    raw: bool

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if DOCUMENTS not in batch:
            return batch
        return batch | {SAMPLES: [self._samples(documents) for documents in batch[DOCUMENTS]]}

    def _samples(self, documents: list[int]) -> list[dict[str, Any]]:
        if self.raw:
            table: Any = self.source.with_format("arrow")[documents]
            return [_plain(read_json(self.source.features, sample)) for sample in table.to_pylist()]
        numbers: Any = self.source.with_format("numpy")
        return [_plain(numbers[int(document)]) for document in documents]


class SamplePacking(Packing):
    """Samples, each a document: its tokens are those that the processor will make."""

    buffer_size = 1000  # undecoded, but their files may be in memory

    def __init__(self, rules: Rules, names: Sequence[str], meter: Meter, further: Sequence[str]) -> None:
        """
        Args:
            names: columns of the dataset; those that no collator reads are refused.
            further: names that the collator is told of.
        """
        super().__init__(replace(rules, can_cut=False))
        check_on_error(meter.on_error)
        if rules.overlong not in ("error", "drop"):
            raise UnsupportedError(
                f"`overlong` ({rules.overlong!r}) would cut through images or audio: choose 'error' or 'drop', and "
                "cut texts before the processor sees them."
            )
        self.names, self.meter = _known(names, further, meter), meter

    def select(self, dataset: Dataset) -> Dataset:
        return dataset.select_columns(self.names)

    def measure(self, source: Dataset, num_proc: int | None) -> Measured:
        heavy = [n for n in self.names if n in ITEM_COLUMNS and n not in (*GRIDS.values(), *AUDIO_MASKS)]
        sizes = source.remove_columns(heavy).with_format("arrow")
        sizes = sizes.map(
            replace(self.meter, features=sizes.features),
            with_indices=True,
            batched=True,
            batch_size=_MEASURED_AT_ONCE,
            remove_columns=sizes.column_names,
            features=Features({"tokens": Value("int64"), "cost": Value("float64"), "reason": Value("string")}),
            load_from_cache_file=False,
            num_proc=num_proc,
            desc="Measuring",
        ).with_format("numpy")
        tokens, costs, reasons = (np.asarray(sizes[name][:]) for name in ("tokens", "cost", "reason"))
        return Measured(np.zeros_like(tokens), tokens, costs, [reason for reason in reasons.tolist() if reason])

    def write(
        self, dataset: Dataset, source: Dataset, measured: Measured, pieces: Pieces, num_proc: int | None
    ) -> Dataset:
        """The numbers of documents: their samples are fetched with a row."""
        assert measured.costs is not None
        ends = pieces.ends
        plan = pa.table(
            {
                DOCUMENTS: lists_of(pieces.documents.astype(np.int64), ends),
                DOCUMENT_LENGTHS: lists_of(pieces.lengths.astype(np.int32), ends),
                COST: pa.array(np.add.reduceat(measured.costs[pieces.documents], ends - pieces.row_sizes)),
            }
        )
        raw = "input_ids" not in self.names or any(name in RAW_COLUMNS for name in self.names)
        return Dataset(plan).with_transform(_Fetch(source, raw))

    def open(self, dataset: IterableDataset) -> tuple[IterableDataset, list[str], None]:
        return undecoded(dataset).with_format(None), self.names, None

    def read(self, batch: dict[str, list[Any]], indices: list[int]) -> list[dict[str, Any]]:
        _known([name for name in batch if name not in self.names], (), self.meter)  # of a stream without a schema
        columns = [batch.get(name, [None] * len(indices)) for name in self.names]
        return [_plain(dict(zip(self.names, values, strict=True))) for values in zip(*columns, strict=True)]

    def measure_buffer(self, read: list[dict[str, Any]], indices: list[int]) -> Measured:
        found = [self.meter.measure(f"sample {i}", sample) for i, sample in zip(indices, read, strict=True)]
        tokens = np.array([s.tokens if isinstance(s, Size) else LEFT_OUT for s in found], dtype=np.int64)
        costs = np.array([s.cost if isinstance(s, Size) else 0.0 for s in found])
        return Measured(np.zeros_like(tokens), tokens, costs, [s for s in found if isinstance(s, str)])

    def write_buffer(self, read: list[dict[str, Any]], measured: Measured, pieces: Pieces) -> dict[str, list[Any]]:
        assert measured.costs is not None
        rows = [pieces.documents[row] for row in pieces.rows()]
        return {
            SAMPLES: [[read[number] for number in row] for row in rows],
            DOCUMENT_LENGTHS: [measured.lengths[row].tolist() for row in rows],
            COST: [sum(measured.costs[row].tolist()) for row in rows],
        }


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Without the columns that a sample does not have: a table gives every row those of all."""
    return {name: value for name, value in sample.items() if value is not None}


def _known(names: Sequence[str], further: Sequence[str], meter: Meter) -> list[str]:
    """The columns, all of which a collator reads.

    Raises:
        ValueError: one that it does not, which would be lost.
    """
    raw = (*RAW_COLUMNS, *TEXT_COLUMNS) if meter.reader is None else meter.reader.reader.columns
    unknown = [name for name in names if name not in (*READ, *raw, *further)]
    if unknown:
        reader = "the collator" if meter.reader is None else "the collator or the chat template"
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in unknown)} would be lost, since {reader} reads no such column: drop "
            f"it with dataset.remove_columns({unknown}), or name in `columns` what holds one number a token, and in "
            "`item_columns` what holds items along its first axis."
        )
    return list(names)


def column_names(dataset: Dataset | IterableDataset, look_at: int) -> list[str]:
    """Names of the columns; of a stream without a schema those of its first samples."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    found = dict.fromkeys(name for sample in itertools.islice(dataset, look_at) for name in sample)
    if not found:
        raise ValueError("`dataset` has no samples: there is nothing to pack.")
    return list(found)
