"""One batch as two of near equal cost, between documents or between rows. Shapes: B rows, S tokens of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hf_veomni.attention.documents import Documents
from hf_veomni.data.sampler import attention_cost
from hf_veomni.host import forget, knows, on_host, with_values

# [B, S] each; `position_ids` also [n, B, S]. What else a batch may hold (patches, masks of a family) is not split.
_SPLIT = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask")
_IGNORED = -100


def split_batch(batch: Mapping[str, Any], hidden_size: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both halves of a batch, which give the sum of its losses: rows, or of one packed row the documents.

    Args:
        hidden_size: of the model, for the cost of a document (`attention_cost`).

    Returns:
        None where there is nothing to split: one document, a row whose positions tell of no documents, a boundary that
        a target crosses, or columns that count something else than tokens.
    """
    columns = {name: value for name, value in batch.items() if value is not None}
    ids = columns.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not all(_fits(n, x, ids) for n, x in columns.items()):
        return None
    if len(ids) > 1:
        middle = len(ids) // 2
        return _part(columns, slice(None, middle), slice(None)), _part(columns, slice(middle, None), slice(None))
    middle = _boundary(columns, hidden_size)
    if middle is None:
        return None
    return _part(columns, slice(None), slice(None, middle)), _part(columns, slice(None), slice(middle, None))


def _fits(name: str, value: object, ids: Tensor) -> bool:
    if name not in _SPLIT or not isinstance(value, Tensor):
        return False
    return value.shape == ids.shape or (name == "position_ids" and value.dim() == 3 and value.shape[1:] == ids.shape)


def _part(columns: dict[str, Tensor], rows: slice, tokens: slice) -> dict[str, Any]:
    return {name: _slice(value, (..., rows, tokens)) for name, value in columns.items()}


def _slice(tensor: Tensor, index: Any) -> Tensor:
    part = forget(tensor)[index]
    return with_values(part, forget(on_host(tensor))[index]) if knows(tensor) else part


def _boundary(columns: dict[str, Tensor], hidden_size: int) -> int | None:
    """The token of a packed row [1, S] at which a document begins that leaves both sides nearly equal in cost."""
    positions = columns.get("position_ids")
    if positions is None or (positions.dim() == 3 and len(positions) != 4):  # of three axes none is the text's
        return None
    text = positions if positions.dim() == 2 else _slice(positions, 0)
    lengths = np.asarray(Documents.from_position_ids(text).lengths[0])
    begins = lengths.cumsum()[:-1]
    costs = attention_cost(lengths, hidden_size).cumsum()
    free = [place for place, begin in enumerate(begins) if _is_free(columns, int(begin))]
    if not free:
        return None
    return int(begins[min(free, key=lambda place: abs(2 * costs[place] - costs[-1]))])


def _is_free(columns: dict[str, Tensor], begin: int) -> bool:
    """Whether no target is predicted across a boundary."""
    labels, shifted = columns.get("labels"), columns.get("shift_labels")
    if shifted is not None:
        return int(on_host(shifted)[0, begin - 1]) == _IGNORED
    return labels is None or int(on_host(labels)[0, begin]) == _IGNORED
