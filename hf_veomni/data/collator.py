"""The collator: a list of samples becomes one packed row.

T: tokens of the packed row, global (the model cuts the row for sequence parallelism, never the collator).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_veomni.data.columns import DOCUMENT_LENGTHS, IGNORE_INDEX, MODALITY_COLUMNS, modality_error
from hf_veomni.data.pack import ranges_of

_READ = ("input_ids", "labels", "attention_mask", "position_ids", DOCUMENT_LENGTHS)
_OWN = ("input_ids", "labels", "position_ids")


@dataclass
class OmniDataCollatorWithPacking:
    """Put the samples of a batch behind each other in one row, without padding.

    A sample is a document (`input_ids`, optional `labels`) or a row that `pack_dataset` has packed; both may be mixed.
    The batch holds `input_ids`, `labels` and `position_ids`, torch.long [1, T], and no attention mask: each document
    begins where `position_ids` is 0, and the model keeps the documents apart there. Without `labels` the targets are
    the tokens themselves. The first label of each document is -100: nothing is predicted across a boundary.

    Tokens whose `attention_mask` is 0 are padding at the ends of a sample and are cut off. Empty samples are left out.

    Args:
        max_tokens: the largest T that is let through; None lets everything through.
        processor: a tokenizer, or a processor that holds one. Gives the padding token of `pad_to_multiple_of`.
        pad_to_multiple_of: pads the row with one more document of padding tokens and labels -100, for kernels that
            want fixed sizes. Sequence parallelism needs no padding here.
        columns: further keys of one number a token, packed like `input_ids` to [1, T]: whole numbers as torch.long,
            others as torch.float32; 0 on padding.

    Raises:
        ValueError: more than `max_tokens` tokens, a key that is not listed here (images, audio and video among them),
            labels of another length than `input_ids`, or `position_ids` that do not count from 0 in each document.
    """

    max_tokens: int | None = None
    processor: Any = None
    pad_to_multiple_of: int | None = None
    columns: Sequence[str] = ()

    def __post_init__(self):
        if isinstance(self.columns, str):
            self.columns = (self.columns,)
        for name in ("max_tokens", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` ({value!r}) must be a positive integer or None")
        if self.max_tokens and self.pad_to_multiple_of and self.max_tokens % self.pad_to_multiple_of:
            raise ValueError(
                f"`pad_to_multiple_of` ({self.pad_to_multiple_of}) must divide `max_tokens` ({self.max_tokens}), or a "
                "full row could not be padded"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise ValueError("the collator got an empty list of samples: it needs at least one")
        keys = set(features[0])
        samples = [self._read(index, sample, keys) for index, sample in enumerate(features)]
        lengths = np.concatenate([lengths for lengths, _ in samples])
        total = int(lengths.sum())
        if not total:
            raise ValueError(f"none of the {len(features)} samples of the batch has a token: remove empty documents")
        if self.max_tokens is not None and total > self.max_tokens:
            raise ValueError(
                f"{len(features)} samples have {total} tokens together, more than `max_tokens` ({self.max_tokens}): "
                "pack the dataset with pack_dataset(dataset, max_tokens) and per_device_train_batch_size=1, batch "
                "with BalancedBatchSampler, or raise `max_tokens`"
            )
        padding = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        batch = {}
        for name in samples[0][1]:
            parts = [tokens[name] for _, tokens in samples]
            fill = self._pad_token() if name == "input_ids" else 0
            batch[name] = np.concatenate([*parts, np.full(padding, fill, dtype=parts[0].dtype)])
        batch.setdefault("labels", batch["input_ids"].copy())
        lengths = np.concatenate([lengths, [padding]]) if padding else lengths
        batch["labels"][(np.cumsum(lengths) - lengths)] = IGNORE_INDEX
        batch["labels"][total:] = IGNORE_INDEX
        batch["position_ids"] = ranges_of(lengths)
        return {name: torch.from_numpy(batch[name]).unsqueeze(0) for name in (*_OWN, *self.columns)}

    def _pad_token(self) -> int:
        """Nothing attends to the padding document and it has no targets, so any token serves; 0 always exists."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        token = getattr(tokenizer, "pad_token_id", None)
        return 0 if token is None else token

    def _read(self, index: int, sample: Mapping[str, Any], keys: set[str]) -> tuple[np.ndarray, dict]:
        """Lengths of a sample's documents, int64 [documents], none of them 0, and its tokens by name, [T] each."""
        self._check_keys(index, sample, keys)
        tokens = {name: _vector(index, name, sample[name]) for name in ("input_ids", *self.columns)}
        if "labels" in sample:
            tokens["labels"] = _vector(index, "labels", sample["labels"])
        length = len(tokens["input_ids"])
        marks = {
            name: _vector(index, name, sample[name]) for name in ("attention_mask", "position_ids") if name in sample
        }
        for name, values in (tokens | marks).items():
            if len(values) != length:
                raise ValueError(
                    f"sample {index} of the batch: `{name}` has {len(values)} elements and `input_ids` has {length}; "
                    "they must have one each a token"
                )
        mask = marks.get("attention_mask")
        if mask is not None and not mask.all():
            kept = _without_padding(index, mask)
            tokens = {name: values[kept] for name, values in tokens.items()}
            marks = {name: values[kept] for name, values in marks.items()}
            length = kept.stop - kept.start
        lengths = _document_lengths(index, length, sample.get(DOCUMENT_LENGTHS), marks.get("position_ids"))
        return lengths, tokens

    def _check_keys(self, index: int, sample: Mapping[str, Any], keys: set[str]) -> None:
        for name in sample:
            if name in MODALITY_COLUMNS:
                raise modality_error(name)
            if name not in _READ and name not in self.columns:
                raise ValueError(
                    f"sample {index} of the batch has a key `{name}` that cannot be packed: if it holds one number a "
                    "token name it in `columns`, else remove it (a Trainer does with remove_unused_columns=True)"
                )
        missing = [name for name in ("input_ids", *self.columns) if name not in sample]
        if missing or ("labels" in sample) != ("labels" in keys):
            name = missing[0] if missing else "labels"
            raise ValueError(f"sample {index} of the batch: `{name}` is missing here or elsewhere in the batch")


def _vector(index: int, name: str, values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if not array.size:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise ValueError(
            f"sample {index} of the batch: `{name}` has shape {array.shape} and type {array.dtype}, and must be one "
            "number a token; position ids of more than one axis (mRoPE) wait for multimodal packing"
        )
    if array.dtype.kind == "f":
        if name in _READ:
            raise ValueError(f"sample {index} of the batch: `{name}` holds {array.dtype}, and must hold integers")
        return array.astype(np.float32, copy=False)
    return array.astype(np.int64, copy=False)


def _without_padding(index: int, mask: np.ndarray) -> slice:
    ones = np.flatnonzero(mask)
    if not ones.size:
        return slice(0, 0)
    if ones[-1] - ones[0] + 1 != ones.size:
        raise ValueError(
            f"sample {index} of the batch: `attention_mask` has zeros between ones: only padding at the ends of a "
            "sample can be cut off"
        )
    return slice(int(ones[0]), int(ones[-1]) + 1)


def _document_lengths(index: int, length: int, given: Any, positions: np.ndarray | None) -> np.ndarray:
    """Lengths of the documents of a sample, from what it says of them; without a word it is one document."""
    if not length:
        return np.zeros(0, dtype=np.int64)
    if given is not None:
        lengths = _vector(index, DOCUMENT_LENGTHS, given)
        if (lengths < 1).any() or lengths.sum() != length:
            raise ValueError(
                f"sample {index} of the batch: `{DOCUMENT_LENGTHS}` sum to {lengths.sum()} and `input_ids` has "
                f"{length} elements; they must be positive and agree"
            )
    elif positions is not None:
        lengths = np.diff(np.flatnonzero(positions == 0), append=length)
    else:
        lengths = np.array([length])
    if positions is not None and not (lengths.sum() == length and (ranges_of(lengths) == positions).all()):
        raise ValueError(
            f"sample {index} of the batch: `position_ids` must count 0, 1, 2, ... in each document"
            + (f" of `{DOCUMENT_LENGTHS}`" if given is not None else "")
            + ": remove them and they are made here"
        )
    return lengths
