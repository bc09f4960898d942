"""The collator: a list of samples becomes one packed sequence.

T: tokens of the packed sequence, global (the model cuts the row for sequence parallelism, never the collator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_veomni.data.media.alignment import Alignment
from hf_veomni.data.media.chat import RawReader
from hf_veomni.data.media.decode import BrokenItemError
from hf_veomni.data.media.skips import SkipLog, check_on_error
from hf_veomni.data.modalities import GRIDS, TEXT_COLUMNS, TOKEN_COLUMNS, is_raw, join_items
from hf_veomni.data.positions import RopeIndex, document_positions
from hf_veomni.data.sample import ASSISTANT_MASK, READ, Sample, ranges_of, read_sample
from hf_veomni.data.samples import DOCUMENTS, ROW_COLUMNS, SAMPLES
from hf_veomni.data.text import IGNORE_INDEX
from hf_veomni.host import remember

_OWN = ("input_ids", "labels")


@dataclass
class OmniDataCollatorWithPacking:
    """Put the samples of a batch behind each other in one row, without padding.

    A sample is one of

    - a document: `input_ids`, optional `labels`, and the columns of images, videos and audio as the model's own
      processor makes them of this sample (`pixel_values`, `image_grid_thw`, `input_features`, ...);
    - a row that `pack_dataset` has packed;
    - with a `processor`, a raw sample: `messages`, `conversations`, `prompt` and `completion`, or `text`, and paths,
      bytes or arrays in `images` and `audios`; `tools`, `chat_template_kwargs` and what else the chat template reads
      goes to it. It is decoded and processed here, that is in the workers of a DataLoader with `num_workers`.

    The batch holds `input_ids` and `labels`, torch.long [1, T], and `position_ids` [1, T], or [4, 1, T] for a model
    with mRoPE (the axis that counts tokens first), and no attention mask: each document begins where the positions are
    0, and the model keeps the documents apart there. Columns of items are joined along their first axis in the order
    of the documents, those of tokens (`mm_token_type_ids`) along the row. Without `labels` the targets are the tokens
    themselves, but for placeholders. The first label of each document is -100: nothing is predicted across a boundary.

    Tokens whose `attention_mask` is 0 are padding at the ends of a sample and are cut off. Empty samples are left out.

    Args:
        max_tokens: the largest T that is let through; None lets everything through.
        processor: the model's processor, or a tokenizer. Reads raw samples, and gives the padding token of
            `pad_to_multiple_of`.
        pad_to_multiple_of: pads the row with one more document of padding tokens and labels -100, for kernels that
            want fixed sizes. Sequence parallelism needs no padding here.
        columns: further keys of one number a token, packed like `input_ids` to [1, T]: integers as torch.long,
            others as torch.float32; 0 on padding.
        model_config: `model.config`. Tells the placeholder tokens and the features that each item becomes, and how the
            model counts positions: `get_rope_index` of its class, where it has one, numbers each document once.
        get_pos_id: computes positions in its place, for example `OmniModel.get_pos_id`: called for each document with
            `input_ids` [1, T] and those of its columns that the signature names; returns [1, T] or [axes, 1, T].
        train_on: labels that remain in raw samples of `messages`: "all", those of the "assistant", or of the "last"
            turn of the assistant. A column `assistant_masks` does the same for processed samples.
        mask_placeholders: whether labels on placeholders of images, videos and audio become -100.
        item_columns: further keys that count items along their first axis, joined along it.
        on_error: what becomes of a raw sample with an image or audio clip that cannot be read: "raise" an error that
            names it, or "skip" the sample; `skipped` counts them.

    Raises:
        ValueError: more than `max_tokens` tokens, a key that is not known here, labels of another length than
            `input_ids`, `position_ids` that do not count from 0 in each document, other numbers of placeholders than
            of features (it names sample, modality and both), or a grid of patches without `model_config`.
    """

    max_tokens: int | None = None
    processor: Any = None
    pad_to_multiple_of: int | None = None
    columns: Sequence[str] = ()
    model_config: Any = None
    get_pos_id: Callable[..., Any] | None = None
    train_on: str = "all"
    mask_placeholders: bool = True
    item_columns: Sequence[str] = ()
    on_error: str = "raise"
    _skips: SkipLog | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.columns = (self.columns,) if isinstance(self.columns, str) else tuple(self.columns)
        self.item_columns = (self.item_columns,) if isinstance(self.item_columns, str) else tuple(self.item_columns)
        for name in ("max_tokens", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` ({value!r}) must be a positive integer or None.")
        if self.max_tokens and self.pad_to_multiple_of and self.max_tokens % self.pad_to_multiple_of:
            raise ValueError(
                f"`pad_to_multiple_of` ({self.pad_to_multiple_of}) must divide `max_tokens` ({self.max_tokens}), or a "
                "full row could not be padded."
            )
        check_on_error(self.on_error)
        self._skips = SkipLog() if self.on_error == "skip" else None
        self._reader = RawReader(self.processor, self.train_on, (*self.columns, *self.item_columns))
        self._alignment = Alignment(self.model_config, self.processor)
        self._placeholders = [token for ids in self._alignment.placeholders.values() for token in ids]
        rope = None if self.model_config is None else RopeIndex(self.model_config, self._alignment.placeholders)
        self._compute = self.get_pos_id or rope or None

    @property
    def skipped(self) -> dict[str, int]:
        """How often each broken sample was left out, by the message that names it; of this process and its workers."""
        return self._skips.counts() if self._skips is not None else {}

    @property
    def tokenizer(self) -> Any:
        """The processor, under the name by which a Trainer looks for what it saves beside a model."""
        return self.processor

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys that a sample may have, for those who remove others."""
        raw = () if self.processor is None else self._reader.columns
        return (*READ, *ROW_COLUMNS, *self.columns, *self.item_columns, *raw)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("The collator got an empty list of samples: it needs at least one.")
        samples = self._read(features)
        lengths = np.concatenate([sample.lengths for sample in samples])
        total = int(lengths.sum())
        if not total:
            raise ValueError(f"None of the {len(features)} samples of the batch has a token: remove empty documents.")
        if self.max_tokens is not None and total > self.max_tokens:
            raise ValueError(
                f"{len(samples)} samples have {total} tokens together, more than `max_tokens` ({self.max_tokens}): "
                "pack the dataset with pack_dataset(dataset, max_tokens) and per_device_train_batch_size=1, batch "
                "with BalancedBatchSampler, or raise `max_tokens`."
            )
        padding = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        batch = {name: self._join(name, samples, padding) for name in self._names(samples)}
        lengths = np.concatenate([lengths, [padding]]) if padding else lengths
        self._mask_labels(batch, lengths, total)
        row = {name: torch.from_numpy(values).unsqueeze(0) for name, values in batch.items()}
        return _remembered(self._complete(row, samples, lengths, padding))

    def _complete(
        self, row: dict[str, torch.Tensor], samples: Sequence[Sample], lengths: np.ndarray, padding: int
    ) -> dict[str, torch.Tensor]:
        """The row with its positions and items."""
        items = [sample for sample in samples if sample.items]
        if self._compute is None and not items and all(sample.positions is None for sample in samples):
            row["position_ids"] = torch.from_numpy(ranges_of(lengths)).unsqueeze(0)  # many short texts: at one go
            return row
        row["position_ids"] = self._positions(samples, padding)
        if not items:
            return row
        return row | join_items([sample.items for sample in items], [sample.where for sample in items])

    def _read(self, features: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """The samples, those of packed sequences among them, broken ones left out if that was chosen."""
        samples, labelled = [], set()
        for where, given in _named(features):
            try:
                if self.processor is not None and is_raw(given):
                    further = {name: given[name] for name in self._reader.further if name in given}
                    given = self._reader.encode(where, given) | further
                else:
                    labelled.add("labels" in given)
            except BrokenItemError as error:
                if self._skips is None:
                    raise
                self._skips.add(str(error))
                continue
            if self.processor is not None:
                given = {name: value for name, value in given.items() if name not in TEXT_COLUMNS}
            if len(labelled) > 1:
                raise ValueError(f"{where}: `labels` is missing here or elsewhere in the batch.")
            sample = read_sample(where, given, self.columns, self.item_columns)
            if sample.items or self._placeholders:
                self._alignment.check(where, sample.tokens["input_ids"], sample.items)
            samples.append(sample)
        return samples or [self._blank()]

    def _blank(self) -> Sample:
        """A document without a target, in the place of a row whose samples were all skipped: ranks stay in step."""
        ids = np.full(2, self._pad_token())
        labels = np.full(2, IGNORE_INDEX)
        columns = {name: np.zeros(2, dtype=np.int64) for name in self.columns}
        return Sample("a blank", np.array([2]), {"input_ids": ids, "labels": labels, **columns}, None, {})

    def _names(self, samples: Sequence[Sample]) -> list[str]:
        found = dict.fromkeys(name for sample in samples for name in sample.tokens)
        return [*_OWN, *(name for name in found if name not in _OWN)]

    def _join(self, name: str, samples: Sequence[Sample], padding: int) -> np.ndarray:
        """One column of all samples, [T]. Missing labels are the tokens, missing token types those of text."""
        parts = []
        for sample in samples:
            ids = sample.tokens["input_ids"]
            if name in sample.tokens:
                parts.append(sample.tokens[name])
            elif name == "labels":
                parts.append(ids)
            else:
                parts.append(np.full_like(ids, name == ASSISTANT_MASK))
        fill = self._pad_token() if name == "input_ids" else 0
        return np.concatenate([*parts, np.full(padding, fill, dtype=parts[0].dtype)])

    def _mask_labels(self, batch: dict[str, np.ndarray], lengths: np.ndarray, total: int) -> None:
        labels = batch["labels"]
        labels[(np.cumsum(lengths) - lengths)] = IGNORE_INDEX
        labels[total:] = IGNORE_INDEX
        chosen = batch.pop(ASSISTANT_MASK, None)
        if chosen is not None:
            labels[chosen == 0] = IGNORE_INDEX
        if self.mask_placeholders and self._placeholders:
            labels[np.isin(batch["input_ids"], self._placeholders)] = IGNORE_INDEX
        if self.mask_placeholders and "mm_token_type_ids" in batch:
            labels[batch["mm_token_type_ids"] > 0] = IGNORE_INDEX

    def _positions(self, samples: Sequence[Sample], padding: int) -> torch.Tensor:
        """[1, T], or [4, 1, T] if any document has more than one axis: text has the same on all of them."""
        parts = [part for sample in samples for part in self._of_sample(sample)]
        if padding:
            parts.append(np.arange(padding)[None])
        axes = max(len(part) for part in parts)
        wide = [np.broadcast_to(part, (axes, part.shape[1])) for part in parts]
        positions = torch.from_numpy(np.concatenate(wide, axis=1))
        return positions if axes == 1 else positions[:, None]

    def _of_sample(self, sample: Sample) -> list[np.ndarray]:
        """Positions of a sample's documents, int64 [1 or 4, T] each."""
        if sample.positions is not None:
            return [sample.positions]
        if self._compute is None:
            grids = [name for name in GRIDS.values() if name in sample.items]
            if grids:
                raise ValueError(
                    f"{sample.where} has `{grids[0]}` and no `position_ids`, and only its model knows how it counts "
                    "them: give `model_config=model.config`, or `get_pos_id`."
                )
            return [ranges_of(sample.lengths)[None]]
        if isinstance(self._compute, RopeIndex) and not sample.items:  # text counts alike on all axes
            return [np.repeat(ranges_of(sample.lengths)[None], 4, axis=0)]
        ends = np.cumsum(sample.lengths)
        tokens = {name: values for name, values in sample.tokens.items() if name in ("input_ids", *TOKEN_COLUMNS)}
        return [
            document_positions(
                self._compute, {name: values[end - length : end] for name, values in tokens.items()}, sample.items
            )
            for end, length in zip(ends.tolist(), sample.lengths.tolist(), strict=True)
        ]

    def _pad_token(self) -> int:
        """Nothing attends to the padding document and it has no targets, so any token serves; 0 always exists."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        token = getattr(tokenizer, "pad_token_id", None)
        return 0 if token is None else token


def _remembered(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integers keep their values on the host as they travel, for models to find boundaries and targets there."""
    return {name: values if values.is_floating_point() else remember(values) for name, values in batch.items()}


def _named(features: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to call each sample, those of packed sequences among them, and its columns but for those that it does not
    have: a table, and a mixture of sources, give every sample those of all."""
    index = 0
    for given in features:
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise ValueError(f"A sample of the batch ({repr(given):.80}) must be a mapping of columns, not a {kind}.")
        row = given[SAMPLES] if SAMPLES in given else (given,)
        numbers = given[DOCUMENTS] if SAMPLES in given and DOCUMENTS in given else [None] * len(row)
        for sample, number in zip(row, numbers, strict=True):
            known = "" if number is None else f" (sample {int(number)} of the dataset)"
            yield f"sample {index} of the batch{known}", {k: v for k, v in sample.items() if v is not None}
            index += 1
