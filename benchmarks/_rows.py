"""Packed sequences of random tokens in ragged documents, the same at each call."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hf_veomni import OmniDataCollatorWithPacking


def ragged_lengths(tokens: int, median: int, seed: int = 0) -> list[int]:
    """Log-normal lengths (sigma 1) that sum to `tokens`; the last document is cut to fit."""
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(np.clip(random.lognormal(np.log(median), 1.0), 2, tokens))
        lengths.append(min(length, tokens - sum(lengths)))
    return lengths


def packed_row(lengths: list[int], vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """One row [1, S] as the collator makes it; every token but the first of a document is a target."""
    random = np.random.default_rng(seed)
    documents = [{"input_ids": random.integers(0, vocabulary, length)} for length in lengths]
    return OmniDataCollatorWithPacking()(documents)
