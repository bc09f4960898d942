"""Routes of a layer's forward, kept for its recomputation under activation checkpointing.

    forward          routes are made: counts exchanged and read back, tokens sorted
    recomputation    the same routes again: no exchange, no read, no sort

A router whose scores are equal up to rounding could choose otherwise the second time, with sizes that ranks do not
agree on; the order of the forward is kept with the sizes, so that both are always of one choice. What is kept is 8
bytes a (token, expert) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_veomni import hf
from hf_veomni.expert.dispatch import Route


class _Kept:
    """Routes of one checkpointed call of a layer, in the order in which they were made."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """`function`: what is checkpointed; called once in the forward, and again for each backward."""
        self.function, self.routes = function, list[Route]()
        self.place: int | None = None  # of the next route; None in the forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _kept.set(self)
        try:
            return self.function(*args, **kwargs)
        finally:
            _kept.reset(token)
            self.place = 0

    def next(self, make: Callable[[], Route]) -> Route:
        if self.place is None:
            route = make()
            self.routes.append(replace(route))  # without what is derived from it
            return route
        route = self.routes[self.place]
        self.place += 1
        return replace(route)


_kept: ContextVar[_Kept | None] = ContextVar("hf_veomni_kept_routes", default=None)


def recall_route(make: Callable[[], Route]) -> Route:
    """The next route of the layer that runs: `make()`, or in a recomputation that of the forward."""
    kept = _kept.get()
    return make() if kept is None else kept.next(make)


class KeepingCheckpoint:
    """A checkpointing function under which the recomputation has the forward's routes."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        """`inner`: called as `inner(function, *args)`, as transformers calls torch's checkpoint."""
        self.inner = inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # whose graph keeps what it needs
            return self.inner(function, *args, **kwargs)
        return self.inner(_Kept(function), *args, **kwargs)


class KeepRoutes:
    """Puts `KeepingCheckpoint` around what checkpoints the layers; checkpointing may be switched on at any time."""

    def __init__(self, model: nn.Module, experts: Iterable[str]) -> None:
        """`experts`: names of the experts modules. A layer around them is checkpointed, or a stack checkpoints it."""
        paths = [name.split(".") for name in experts]
        around = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(len(path)))
        self.around = [model.get_submodule(name) for name in around]
        self.handle = model.register_forward_pre_hook(self.enter)

    def enter(self, model: nn.Module, args: tuple) -> None:
        for module in self.around if model.training else ():
            hf.wrap_checkpointing(module, KeepingCheckpoint)

    def remove(self) -> None:
        self.handle.remove()
        for module in self.around:
            hf.restore_checkpointing(module, KeepingCheckpoint)
