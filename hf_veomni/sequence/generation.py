"""`generate` runs whole rows on every rank of an SP group, with a cache and without one."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn

_GENERATE = "generate"
# Models whose `generate` runs now, the innermost last.
_generating: ContextVar[tuple[nn.Module, ...]] = ContextVar("hf_veomni_generating", default=())


def is_generating(model: nn.Module) -> bool:
    """Whether the call of `model` comes from its own `generate`."""
    return any(one is model for one in _generating.get())


def _generate(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _generating.set((*_generating.get(), model))
    try:
        return original(*args, **kwargs)
    finally:
        _generating.reset(token)


def attach_generate(model: Any) -> None:
    """Have `is_generating` know about calls of `model.generate`, if it has one."""
    if hasattr(model, _GENERATE):
        setattr(model, _GENERATE, partial(_generate, model, getattr(model, _GENERATE)))


def detach_generate(model: Any) -> None:
    """Undo `attach_generate`, unless somebody has wrapped it since; detached it only passes on."""
    current = vars(model).get(_GENERATE)
    if isinstance(current, partial) and current.func is _generate:
        own = current.args[1]
        delattr(model, _GENERATE)
        if own != getattr(model, _GENERATE):
            setattr(model, _GENERATE, own)
