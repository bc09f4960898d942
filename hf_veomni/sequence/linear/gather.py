"""Any mixer under SP, without knowing it: gather the sequence, run the stock module on whole documents, slice.

Every rank runs the documents that reach into its slice, and each of them up to the end of the slice: a row of short
documents costs little more than its share, one document of the whole row up to sp times as much on the last rank.

Shapes: B rows; S, s tokens of the full row and of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_veomni.comm import gather_shards
from hf_veomni.sequence.linear.functions import MixerCall

Span = tuple[int, int, int]


def run_gathered(
    call: MixerCall, forward: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The stock `forward` of a causal mixer on [B, s, *], with the documents of the full row kept apart.

    Args:
        args, kwargs: what else the forward takes; 2-D masks and positions [B, S] are cut to each document, tables
            [B or 1, s, *] (rope) gathered like the hidden states.

    Returns:
        What the forward returns; its first tensor [B, s, *] is put together, the rest (weights, states) is None.

    Collective: one all-gather over the SP group for the hidden states and for each table; its backward is a
    reduce-scatter (sum).
    """
    part, length = hidden_states.shape[1], call.documents.row_length
    low, high = call.rank * part, (call.rank + 1) * part
    whole = _gather(call, hidden_states)
    options = {key: _prepare(call, key, value, part, length) for key, value in kwargs.items()}
    places = [_prepare(call, str(i), value, part, length) for i, value in enumerate(args)]
    rows: list[list[Tensor]] = [[] for _ in range(whole.shape[0])]
    template: Any = None
    for span in _spans(call, low, high):
        (row, begin, end), height = span
        cut = slice(begin, end)
        taken = {key: _cut(value, row, height, cut, length) for key, value in options.items()}
        others = [_cut(value, row, height, cut, length) for value in places]
        template = forward(whole[row : row + height, cut], *others, **taken)
        out = template[0] if isinstance(template, tuple) else template
        for i in range(height):
            rows[row + i].append(out[i : i + 1, max(low - begin, 0) :])
    joined = torch.cat([torch.cat(row, dim=1) for row in rows])
    return (joined, *(None for _ in template[1:])) if isinstance(template, tuple) else joined


def _spans(call: MixerCall, low: int, high: int) -> list[tuple[Span, int]]:
    """Documents that reach into [low, high), cut at `high`, with the number of rows that share each."""
    documents = call.documents
    alike = len(set(documents.lengths)) == 1
    spans = [(row, b, min(e, high)) for row, b, e in documents.spans() if b < high and e > low]
    return [(span, documents.num_rows if alike else 1) for span in spans if not alike or span[0] == 0]


def _gather(call: MixerCall, x: Tensor) -> Tensor:
    return x if call.group is None else gather_shards(x, call.group, dim=1)


def _prepare(call: MixerCall, name: str, value: Any, part: int, length: int) -> Any:
    """Tensors at full length; anything that is not understood is refused."""
    if isinstance(value, tuple):
        return tuple(_prepare(call, name, x, part, length) for x in value)
    if not isinstance(value, Tensor) or value.dim() == 0 or (value.dim() == 2 and value.shape[1] == length):
        return value
    if value.dim() == 3 and value.shape[1] in (part, length):
        return _gather(call, value) if value.shape[1] == part else value
    if value.dim() == 4 and value.shape[-2:] == (length, length):
        return value
    raise ValueError(
        f"A module under the rule 'sp: gather' takes `{name}` of shape {tuple(value.shape)}, of which it is not known "
        f"how to cut it into documents of rows of {length} tokens: use sp_size=1 with one document a row."
    )


def _cut(value: Any, row: int, height: int, cut: slice, length: int) -> Any:
    """The part of `value` that belongs to `height` rows from `row` on and to one document."""
    if isinstance(value, tuple):
        return tuple(_cut(x, row, height, cut, length) for x in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    value = value[row : row + height] if value.shape[0] > 1 else value
    return value[..., cut, cut] if value.dim() == 4 else value[:, cut]
