"""Batches under a token budget in the Trainer: `BalancedBatchSampler` in place of batches of so many rows."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import has_length

from hf_veomni.data import BalancedBatchSampler, attention_cost
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState

_DOCUMENT_LENGTHS, _COST = "document_lengths", "cost"
_READ_AT_ONCE = 16_384


class TokenBudgetSampler(BalancedBatchSampler, BatchRebalanceSampler):
    """`BalancedBatchSampler` as Trainer knows samplers of batches: by this base class it tells that it must hand one
    to the loader as it is, and that accelerate must not share its batches out a second time. Nothing else of it is
    used."""


def check_budget(arguments: Any, dataset: Any) -> None:
    """Refuse a training set that no budget can be planned for.

    Raises:
        UnsupportedError: a stream.
    """
    if arguments.token_budget is not None and dataset is not None and not has_length(dataset):
        raise UnsupportedError(
            f"`token_budget` ({arguments.token_budget}) needs the lengths of all samples before training, and "
            f"`train_dataset` ({type(dataset).__name__}) is a stream: leave `token_budget` out and pack the stream "
            "with pack_dataset(dataset, max_tokens)."
        )


def sample_sizes(dataset: Any, length_column: str) -> tuple[np.ndarray, Any]:
    """Tokens of each sample, int64 [n], and what `attention_cost` takes: the same, or lengths of documents.

    Read from `length_column`, from the rows of `pack_dataset`, or from `input_ids`.
    """
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else ()
    if _DOCUMENT_LENGTHS in columns:
        documents = [np.asarray(lengths) for lengths in dataset.with_format(None)[_DOCUMENT_LENGTHS][:]]
        return np.array([lengths.sum() for lengths in documents]), documents
    if length_column in columns:
        lengths = np.asarray(dataset.with_format(None)[length_column][:])
    elif "input_ids" in columns:
        tables: Any = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_READ_AT_ONCE)
        lengths = np.concatenate([pc.call_function("list_value_length", [table["input_ids"]]) for table in tables])
    else:
        lengths = np.array([len(dataset[index]["input_ids"]) for index in range(len(dataset))])
    return lengths, lengths


def budget_sampler(arguments: Any, dataset: Any, state: ParallelState, hidden_size: int) -> TokenBudgetSampler:
    """The batches of this data rank.

    Raises:
        ValueError: a sample that exceeds the budget, or an empty one.
    """
    lengths, documents = sample_sizes(dataset, arguments.length_column_name)
    if (lengths > arguments.token_budget).any():
        index = int((lengths > arguments.token_budget).argmax())
        raise ValueError(
            f"`token_budget` ({arguments.token_budget}) must hold every sample, and sample {index} has "
            f"{lengths[index]} tokens: raise it, or split documents."
        )
    counted = isinstance(dataset, datasets.Dataset) and _COST in dataset.column_names  # pictures and sounds included
    return TokenBudgetSampler(
        np.asarray(dataset.with_format(None)[_COST][:]) if counted else attention_cost(documents, hidden_size),
        arguments.token_budget,
        num_ranks=state.dp_size,
        rank=state.dp_rank,
        seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        lengths=lengths,
        shuffle=arguments.train_sampling_strategy == "random",
        drop_last=arguments.dataloader_drop_last,
    )
