"""The plan of a packing: which part of which document goes into which row. Index arithmetic over lengths.

n documents, p pieces (a document, or a part of one that was too long), r rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_veomni.data.planning import STRATEGIES, members
from hf_veomni.data.sample import ranges_of

logger = logging.getLogger(__name__)

OVERLONG = ("error", "split", "truncate", "drop")


@dataclass(frozen=True)
class Rules:
    max_tokens: int
    strategy: str
    overlong: str
    columns: Any  # Columns of rows of text; names where rows are samples
    can_cut: bool = True  # False where documents hold images or audio


@dataclass(frozen=True)
class Pieces:
    """Pieces row after row: the document [p], first token in it [p] and tokens [p] of each; pieces of a row [r]."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_sizes: np.ndarray


def plan_rows(starts: np.ndarray, lengths: np.ndarray, rules: Rules, names: Sequence[int] | None = None) -> Pieces:
    """Decide which piece goes into which row. `names`: what to call the documents in messages, default 0..n-1."""
    documents, starts, lengths = _fit(starts, lengths, rules, range(len(lengths)) if names is None else names)
    order, row_sizes = members(STRATEGIES[rules.strategy](lengths, rules.max_tokens))
    return Pieces(documents[order], starts[order], lengths[order], row_sizes)


def _fit(starts: np.ndarray, lengths: np.ndarray, rules: Rules, names: Sequence[int]):
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
