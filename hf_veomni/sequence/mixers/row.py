"""The row that the linear-attention layers of a stack work on, also when activation checkpointing runs them again."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hf_veomni.attention.documents import Documents


@dataclass(eq=False)
class LinearRow:
    """What one forward of one stack works on.

    Attributes:
        documents: of the full rows; None where every rank runs whole rows as the stock model does (with a cache).
        layouts: index tensors that the layers share, once a forward instead of once a layer.
        calls: of mixers in the forward so far.
    """

    documents: Documents | None
    layouts: dict[Any, Any] = field(default_factory=dict)
    calls: int = 0


# Set around the forward of a decoder stack, and around each recomputation of a layer during the backward.
current_row: ContextVar[LinearRow | None] = ContextVar("hf_veomni_linear_row", default=None)


class CarriedCheckpoint:
    """A checkpointing function that hands the row of the forward on to the recomputation.

    The backward runs outside of the stack, on a GPU even in a thread of its own, where no ContextVar is set.
    """

    def __init__(self, inner: Callable[..., Any]) -> None:
        """`inner`: called as `inner(function, *args)`, as transformers calls torch's checkpoint."""
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.inner(_Carried(function, current_row.get()), *args, **kwargs)


class _Carried:
    def __init__(self, function: Callable[..., Any], row: LinearRow | None) -> None:
        self.function, self.row = function, row

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = current_row.set(self.row)
        try:
            return self.function(*args, **kwargs)
        finally:
            current_row.reset(token)
