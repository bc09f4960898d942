"""Any module under SP, without knowing it: gather the sequence, run the stock module on full documents, slice.

Every rank runs the documents that reach into its slice, each to its end, so nothing need be known of who sees whom: a
row of short documents costs little more than its share, one document of the full length sp times as much.

Shapes: B rows; S, s tokens of the full row and of this rank, with the padding at the end; n tokens of one document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_veomni.comm import gather_shards
from hf_veomni.errors import UnsupportedError
from hf_veomni.sequence.mixers.functions import MixerCall

# What belongs to another sequence, which every rank has in full; what says which tokens see each other; and tables
# that are made for the positions of the row, not for those of its documents (CLVP turns values by them too).
_OTHER = re.compile(r"encoder|cross_|key_value_states")
_PAIRS = re.compile(r"mask|bias")
_OF_ROW = re.compile(r"^rotary_pos_emb$|sinusoidal")
_TABLES = re.compile(r"embed|rope|cos|sin")  # one entry for each token, whatever their width


class _Span(NamedTuple):
    """Tokens [begin, end) of `height` rows from `row` on."""

    row: int
    height: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Kept:
    """What a module returned beside its hidden states, per span: the next module takes it on the same spans.

    DSA's choice of tokens and T5's position bias go from layer to layer so.
    """

    parts: tuple[Any, ...]

    @classmethod
    def __torch_function__(cls, function: object, *_: object) -> Any:
        raise UnsupportedError(
            f"`{getattr(function, '__name__', function)}` was called on what a module under the rule 'sp: gather' "
            "passed to one that is not: name all modules of the backbone that share it, or none."
        )


def run_gathered(
    call: MixerCall, forward: Callable[..., Any], hidden_states: Tensor, inputs: Mapping[str, Any]
) -> Any:
    """The stock `forward` of a module on [B, s, *], with the documents of the full row kept apart.

    Args:
        inputs: what else the forward takes, by name. Masks, biases and positions of the full row are cut to each
            document, tables [B or 1, s, *] (rope) gathered like the hidden states. With the states of another sequence
            (cross-attention) rows are run in full.

    Returns:
        What the forward returns; its first tensor [B, s, *] is put together, zeros for padding. The rest can only go
        on to other modules under the rule.

    Collective: one all-gather over the SP group for the hidden states and for each table; its backward is a
    reduce-scatter (sum).

    Raises:
        UnsupportedError: an input of which it is not known how to cut it.
    """
    _check(call, hidden_states, inputs)
    part, length = hidden_states.shape[1], call.documents.row_length
    low, high = call.rank * part, (call.rank + 1) * part
    full = _gather(call, hidden_states, 1)
    crosses = any(_OTHER.search(name) and isinstance(value, Tensor) for name, value in inputs.items())
    if crosses:
        spans = [_Span(0, len(full), 0, length)]
    else:
        spans = _spans(call, low, high)
        inputs = {name: _prepare(call, name, value, part, full) for name, value in inputs.items()}
    rows: list[list[Tensor]] = [[] for _ in range(full.shape[0])]
    rest: list[tuple[Any, ...]] = []
    template: Any = None
    for index, span in enumerate(spans):
        taken = {name: _cut(name, value, None if crosses else span, index, full) for name, value in inputs.items()}
        rows_of_span = full[span.row : span.row + span.height, span.begin : span.end].contiguous()
        template = forward(rows_of_span, **taken)
        out, *others = template if isinstance(template, tuple) else (template,)
        if not isinstance(out, Tensor):
            raise _refuse(f"returns {type(out).__name__} where its tokens' states should be")
        rest.append(tuple(others))
        for i in range(span.height):
            rows[span.row + i].append(out[i : i + 1, max(low - span.begin, 0) : high - span.begin])
    joined = torch.cat([_filled(row, part) for row in rows])
    if not isinstance(template, tuple):
        return joined
    full_output = (joined, *map(_keep, zip(*rest, strict=True)))
    return getattr(template, "_make", tuple)(full_output)  # of a named tuple


def _refuse(reason: str) -> UnsupportedError:
    return UnsupportedError(f"A module under the rule 'sp: gather' {reason}: use sp_size=1 with one document a row.")


def _check(call: MixerCall, hidden_states: object, inputs: Mapping[str, Any]) -> None:
    documents = call.documents
    if not isinstance(hidden_states, Tensor) or hidden_states.shape[1:2] != (documents.row_length // call.size,):
        shape = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
        raise _refuse(f"takes {shape}, not [rows, {documents.row_length // call.size} tokens of the slice, ...]")
    name = next((n for n, x in inputs.items() if _OF_ROW.search(n) and x is not None), None)
    if documents.holds_several and name is not None:
        raise _refuse(f"takes `{name}`, positions of the row, not of the documents that are packed in it")


def _spans(call: MixerCall, low: int, high: int) -> list[_Span]:
    """Documents that reach into [low, high), without the padding; rows that are cut alike go together.

    A rank that holds nothing but padding runs the last document, so that it takes part in what the module does.
    """
    documents = call.documents
    last = documents.row_length - documents.padding
    low = min(low, last - 1)
    alike = len(set(documents.lengths)) == 1
    found = [(row, b, min(e, last)) for row, b, e in documents.spans() if b < min(high, last) and min(e, last) > low]
    return [_Span(row, documents.num_rows if alike else 1, b, e) for row, b, e in found if not alike or row == 0]


def _filled(parts: list[Tensor], size: int) -> Tensor:
    """[1, size, *] of the pieces of one row, zeros behind them."""
    missing = size - sum(x.shape[1] for x in parts)
    return torch.cat([*parts, parts[0].new_zeros(1, missing, *parts[0].shape[2:])], dim=1)


def _keep(values: tuple[Any, ...]) -> _Kept | None:
    return _Kept(values) if all(isinstance(x, Tensor) for x in values) else None


def _gather(call: MixerCall, x: Tensor, dim: int) -> Tensor:
    return x if call.group is None else gather_shards(x, call.group, dim=dim)


def _prepare(call: MixerCall, name: str, value: object, part: int, full: Tensor) -> Any:
    """Tensors at full length; anything that is not understood is refused."""
    if isinstance(value, tuple):
        return tuple(_prepare(call, name, x, part, full) for x in value)
    if isinstance(value, dict):  # one mask for each kind of layer
        return {key: _prepare(call, name, x, part, full) for key, x in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    num_rows, length = full.shape[:2]
    if value.dim() in (2, 3) and value.shape[0] in (1, num_rows) and value.shape[1] in (part, length):
        return _gather(call, value, 1) if value.shape[1] == part != length else value
    if value.dim() == 4 and _of_pairs(name, value, length):
        if all(size in (1, length) for size in value.shape[-2:]):
            return value
    elif value.dim() == 4 and value.shape[0] in (1, num_rows) and value.shape[2] in (part, length):
        return _gather(call, value, 2) if value.shape[2] == part != length else value
    raise _refuse(
        f"takes `{name}` of shape {tuple(value.shape)}, of which it is not known how to cut it into documents of rows "
        f"of {length} tokens"
    )


def _of_pairs(name: str, value: Tensor, length: int) -> bool:
    """Whether a tensor has entries for pairs of tokens: [.., S or 1, S or 1]."""
    if _PAIRS.search(name):
        return True
    return value.dim() == 4 and value.shape[-2:] == (length, length) and not _TABLES.search(name)


def _cut(name: str, value: object, span: _Span | None, index: int, full: Tensor) -> Any:
    """The part of `value` that belongs to one span; None: rows are full."""
    if isinstance(value, _Kept):
        return value.parts[index]
    if span is None:
        return value
    if isinstance(value, tuple):
        return tuple(_cut(name, x, span, index, full) for x in value)
    if isinstance(value, dict):
        return {key: _cut(name, x, span, index, full) for key, x in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    num_rows, length = full.shape[:2]
    if value.shape[0] == num_rows > 1:
        value = value[span.row : span.row + span.height]
    pairs = _of_pairs(name, value, length)
    dims = {2: (1,), 3: (1, 2) if pairs else (1,), 4: (2, 3) if pairs else (2,)}[value.dim()]
    for dim in dims:
        if value.shape[dim] == length:
            value = value.narrow(dim, span.begin, span.end - span.begin)
    return value
