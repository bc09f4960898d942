"""What runs now: one immutable context of the running forward, in the package's one ContextVar.

    prepared model    call         for the time of its forward
      decoder stack   row, documents

Whoever enters fields leaves them again; in between whatever runs finds them in `current()`. Attention, sequences,
experts and towers all read the context, so it stands below all of them and knows them by their types alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from hf_veomni.attention.documents import Documents


@dataclass(eq=False)
class Row:
    """What one forward of one stack works on. `whole`: no slicing, every rank of the SP group runs the full row."""

    owner: object  # the SequenceAttachment
    length: int
    padded: int
    whole: bool
    cut: bool = False  # whether a layer has got its slice
    gathered: bool = False  # whether the layers' output has been put together again


@dataclass(eq=False)
class Call:
    """One call of a prepared model, around that of its stack."""

    owner: object  # the SequenceAttachment
    cached: bool  # whether a cache was asked for; some families hand their stack the default of their config
    positions: Tensor | None  # Mamba's model does not hand them on to its stack
    row: Row | None = None  # the last one that its stack was called with


class _Entry(NamedTuple):
    owner: object
    before: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The running forward, as far as it goes beyond the arguments of a module.

    Attributes:
        call: of a prepared model.
        row: that a stack works on; None outside of it, where slicing is the rule (a recomputation without a carrier).
        documents: packed in the row [B, S]; masks are created from them. None where every rank runs the whole row.
        entries: what `leave` puts back, the innermost first.
    """

    call: Call | None = None
    row: Row | None = None
    documents: Documents | None = None
    entries: tuple[_Entry, ...] = ()


_NOTHING = ForwardContext()
_current: ContextVar[ForwardContext] = ContextVar("hf_veomni_forward", default=_NOTHING)


def current() -> ForwardContext:
    """The context of the forward that runs; an empty one outside of any."""
    return _current.get()


def enter(owner: object, **fields: Any) -> None:
    """Set fields of the context, until `leave(owner)`."""
    now = current()
    entry = _Entry(owner, {name: getattr(now, name) for name in fields})
    _current.set(replace(now, entries=(entry, *now.entries), **fields))


def leave(owner: object) -> None:
    """Put back what the last `enter(owner)` has set; nothing where there was none (its hook raised before).

    Fields of other owners stay: torch runs the hooks after a forward in the order of those before it, not reversed.
    """
    now = current()
    entry = next((entry for entry in now.entries if entry.owner is owner), None)
    if entry is not None:
        left = tuple(other for other in now.entries if other is not entry)
        _current.set(replace(now, entries=left, **entry.before))


@contextmanager
def within(**fields: Any) -> Iterator[None]:
    """Set fields of the context for the time of a block."""
    owner = object()
    enter(owner, **fields)
    try:
        yield
    finally:
        leave(owner)


def is_cut() -> bool:
    """Whether layers see slices: also in a recomputation."""
    row = current().row
    return row is None or not row.whole
