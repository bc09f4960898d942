"""`generate` runs full rows on every rank of an SP group, with a cache and without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from hf_veomni.context import current, within

_GENERATE = "generate"


def _generate(model: nn.Module, original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    with within(generating=(*current().generating, model)):
        return original(*args, **kwargs)


def attach_generate(model: Any) -> None:
    """Have `is_generating` know about calls of `model.generate`, if it has one."""
    if hasattr(model, _GENERATE):
        setattr(model, _GENERATE, partial(_generate, model, getattr(model, _GENERATE)))


def detach_generate(model: object) -> None:
    """Undo `attach_generate`, unless somebody has wrapped it since; detached it only passes on."""
    current = vars(model).get(_GENERATE)
    if isinstance(current, partial) and current.func is _generate:
        own = current.args[1]
        delattr(model, _GENERATE)
        if own != getattr(model, _GENERATE):
            setattr(model, _GENERATE, own)
