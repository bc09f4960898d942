"""Read mask functions of transformers (5.23, 5.24) into numbers: the only file that knows `masking_utils`' closures.

    and_masks(sliding_window_overlay(4), causal_mask_function)  ->  before=3, after=0
    or_masks(causal_mask_function, <anything>)                  ->  evaluate

A closure is known by its code object. What is not known is left to evaluation: it costs time, not correctness.

Shapes: B rows; S tokens of a full row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_veomni.context import current
from hf_veomni.hf.require import VersionError

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """What a mask function was read into. A query attends to `before` tokens to its left and `after` to its right.

    Attributes:
        before, after: in tokens; None for no limit. Causal is after=0.
        chunk: tokens of a chunk, outside of which nothing is seen; None for no chunks.
        chunk_start: [B], where the first chunk of each row begins; None if `positions` tells.
        segments: [B, S], the packed document of every token; None if the function knows of none.
        positions: [B, S], positions within the packed documents.
        evaluate: the limits above are necessary, not sufficient: the function itself decides.
    """

    before: int | None = None
    after: int | None = None
    chunk: int | None = None
    chunk_start: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    evaluate: bool = False


def required(name: str) -> Any:
    """A function of `masking_utils`.

    Raises:
        VersionError: this version of transformers has none of that name.
    """
    try:
        return getattr(masking_utils, name)
    except AttributeError:
        raise VersionError(
            f"transformers.masking_utils has no `{name}`, which the varlen attention reads masks with (verified with "
            "transformers 5.23 and 5.24): install one of these, or keep the model's attention with attention='keep'."
        ) from None


@lru_cache(maxsize=1)
def _known_codes() -> dict[Any, str]:
    """Code object of every closure that is understood -> its factory's name."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    plain = ("causal_mask_function", "bidirectional_mask_function")
    samples: dict[str, tuple[Any, ...]] = {
        "and_masks": (),
        "or_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (1, nothing),
        "packed_sequence_mask_function": (nothing,),
        "remap_positions_for_packed_sequence": (required(plain[0]), nothing),
    }
    codes = {required(name).__code__: name for name in plain}
    return codes | {required(name)(*sample).__code__: name for name, sample in samples.items()}


def _read(function: MaskFunction) -> tuple[str | None, dict[str, Any]]:
    """Name of a mask function, None if it is not known, and the variables it closes over."""
    code = getattr(function, "__code__", None)
    name = _known_codes().get(code)
    cells = getattr(function, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    return name, {key: cell.cell_contents for key, cell in zip(names, cells, strict=True)}


def _closest(left: int | None, right: int | None) -> int | None:
    return right if left is None else left if right is None else min(left, right)


def _meet(one: Pattern, other: Pattern) -> Pattern:
    """Both at once. What can be held only once and is there twice is left to evaluation."""
    held = ("chunk", "chunk_start", "segments", "positions")
    twice = any(getattr(one, key) is not None and getattr(other, key) is not None for key in held)
    either = {key: getattr(other, key) if getattr(one, key) is None else getattr(one, key) for key in held}
    return Pattern(
        _closest(one.before, other.before),
        _closest(one.after, other.after),
        evaluate=one.evaluate or other.evaluate or twice,
        **either,
    )


def read_pattern(function: MaskFunction) -> Pattern:
    """Read a mask function of transformers, as far as its closures are known.

    Raises:
        VersionError: transformers lacks one of the closures that are known here.
    """
    name, held = _read(function)
    match name:
        case "causal_mask_function":
            return Pattern(after=0)
        case "bidirectional_mask_function":
            return Pattern()
        case "sliding_window_overlay" if isinstance(window := held.get("sliding_window"), int) and window > 0:
            return Pattern(before=window - 1)  # kv > q - window
        case "sliding_window_bidirectional_overlay" if isinstance(window := held.get("sliding_window"), int):
            return Pattern(before=window, after=window)
        case "chunked_overlay" if isinstance(held.get("chunk_size"), int):
            return Pattern(chunk=held["chunk_size"], chunk_start=held.get("left_padding"))
        case "packed_sequence_mask_function" if isinstance(held.get("packed_sequence_mask"), Tensor):
            return Pattern(segments=held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence" if isinstance(held.get("position_ids"), Tensor):
            inner = read_pattern(held["mask_function"])
            if inner.segments is None and inner.positions is None:
                return replace(inner, chunk_start=None, positions=held["position_ids"])
        case "and_masks":
            pattern = Pattern()
            for part in held.get("mask_functions", (None,)):
                pattern = _meet(pattern, read_pattern(part))
            return pattern
    return Pattern(evaluate=True)


def holds_absolute_chunks(function: MaskFunction) -> bool:
    """Whether chunks are counted from the row's begin somewhere in what has to be evaluated."""
    name, held = _read(function)
    if name in ("and_masks", "or_masks"):
        return any(holds_absolute_chunks(part) for part in held.get("mask_functions", ()))
    return name == "chunked_overlay"


_PACKED = "find_packed_sequence_indices"
_TELLS = "_omni_tells"


def tell_packing() -> None:
    """Have transformers ask the running forward's documents for packing, not its positions. Idempotent.

    For each mask that it makes, it compares positions with their neighbours and asks the device whether any document
    begins within a row. The documents (`context`) answer in its place if they were read of the same positions.
    """
    stock = required(_PACKED)
    if hasattr(stock, _TELLS):
        return

    @wraps(stock)
    def find(position_ids: Tensor, *args: object, **kwargs: object) -> Tensor | None:
        documents = current().documents
        if documents is None or torch.compiler.is_compiling() or not documents.told_by(position_ids):
            return stock(position_ids, *args, **kwargs)
        return documents.segments

    setattr(find, _TELLS, stock)
    setattr(masking_utils, _PACKED, find)


def untell_packing() -> None:
    """Put transformers' own function back, unless somebody has replaced it since."""
    setattr(masking_utils, _PACKED, getattr(required(_PACKED), _TELLS, required(_PACKED)))
