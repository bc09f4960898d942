"""What runs now: a row through a stack, and the call of a model around it."""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Row:
    """What one forward of one stack works on. `whole`: no slicing, every rank of the SP group runs the full row."""

    owner: Any  # the SequenceAttachment
    length: int
    padded: int
    whole: bool
    cut: bool = False  # whether a layer has got its slice
    gathered: bool = False  # whether the layers' output has been put together again
    tokens: list[tuple[ContextVar, Token]] = field(default_factory=list)


# Set while a stack runs its forward; in a recomputation during backward it is None, and slicing is the rule.
current_row: ContextVar[Row | None] = ContextVar("hf_veomni_row", default=None)


@dataclass
class Call:
    """One call of a prepared model, around that of its stack."""

    owner: Any  # the SequenceAttachment
    cached: bool
    positions: Tensor | None  # Mamba's model does not hand them on to its stack
    token: Token | None = None
    row: Row | None = None  # the last one that its stack was called with


# Whether the caller of the model asked for a cache. The stack alone cannot tell: some families hand it the default of
# their config.
current_call: ContextVar[Call | None] = ContextVar("hf_veomni_call", default=None)


def is_cut() -> bool:
    """Whether layers see slices: also in a recomputation."""
    row = current_row.get()
    return row is None or not row.whole
