"""How far the step of a dry run is, by layer of its forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_veomni import hf

Tell = Callable[[str, int, int], None]

_tell: Tell | None = None  # of this process, in which one dry run runs at a time


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Steps within call `tell(phase, layers, of)` at each layer, with phase "forward" or "backward"."""
    global _tell
    outer, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = outer


@contextmanager
def watch_layers(model: nn.Module, passes: int, phase: Callable[[], str]) -> Iterator[None]:
    """Tell of the backbone's layers in a step that goes through them `passes` times; `phase`: what the step is doing.

    A layer's backward begins when the gradient of its output is there. What runs in the phase of the backward is a
    recomputation, and no layer more.
    """
    tell = _tell
    if tell is None:
        yield
        return
    layers = [module for module in hf.find_backbone(hf.base_model(model)).modules() if hf.is_layer(module)]
    done = {"forward": 0, "backward": 0}

    def count(name: str) -> None:
        done[name] += 1
        tell(name, done[name], passes * len(layers))

    def end(layer: nn.Module, args: object, output: Any) -> None:
        if phase() != "forward":
            return
        count("forward")
        made = next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad), None)
        if made is not None:
            made.register_hook(lambda gradient: count("backward"))

    handles = [layer.register_forward_hook(end) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
