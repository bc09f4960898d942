"""Routes of a layer's forward, kept for its recomputation under activation checkpointing.

    forward          routes are made: counts exchanged and read back, tokens sorted
    recomputation    the same routes again: no exchange, no read, no sort

A router whose scores are equal up to rounding could choose otherwise the second time, with sizes that ranks do not
agree on; the order of the forward is kept with the sizes, so that both are always of one choice. What is kept is 8
bytes a (token, expert) pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from hf_veomni import hf
from hf_veomni.context import CheckpointCarrier, current
from hf_veomni.expert.dispatch import Route


def recall_route(make: Callable[[], Route]) -> Route:
    """The next route of the layer that runs: `make()`, or in a recomputation that of the forward."""
    recorded = current().recorded
    return make() if recorded is None else replace(recorded.recall(make))  # what is kept has nothing derived from it


class KeepRoutes:
    """Puts the carrier around what checkpoints the layers; checkpointing may be switched on at any time."""

    def __init__(self, model: nn.Module, experts: Iterable[str]) -> None:
        """`experts`: names of the experts modules. A layer around them is checkpointed, or a stack checkpoints it."""
        paths = [name.split(".") for name in experts]
        around = dict.fromkeys(".".join(path[:depth]) for path in paths for depth in range(len(path)))
        self.around = [model.get_submodule(name) for name in around]
        self.handle = model.register_forward_pre_hook(self.enter)

    def enter(self, model: nn.Module, args: tuple) -> None:
        if model.training:
            hf.wrap_checkpointing(self.around, CheckpointCarrier)

    def remove(self) -> None:
        self.handle.remove()
        hf.restore_checkpointing(self.around, CheckpointCarrier)
