"""Bytes of live tensors, storage by storage, from inside of PyTorch: no allocator, no resident set.

`MemoryLog` writes down the birth and the death of every storage that an operation makes. What a storage was for is
often known only later (a gradient is one when it reaches its parameter), so kinds are given afterwards and the curve
of one kind is computed from the log. Scratch memory inside of a single kernel is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FSDP = "/torch/distributed/fsdp/"
TORCH = "/torch/"


def _plain(values: Any) -> list[Tensor]:
    """Tensors with memory of their own; wrappers (DTensor, lazy logits) only claim a size."""
    return [value for value in tree_leaves(values) if type(value) in (Tensor, nn.Parameter)]


def _origin() -> tuple[str, str]:
    """Kind and the calling code outside of torch: "fsdp" for what FSDP allocates (gathered parameters, buffers)."""
    kind, place = "activation", ""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if FSDP in name:
            kind = "fsdp"
        if not place and TORCH not in name:
            place = f"{Path(name).stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return kind, place


class MemoryLog(TorchDispatchMode):
    """Context in which storages are logged. Kinds: "activation", "gradient", "fsdp"; existing ones are left out."""

    def __init__(self) -> None:
        super().__init__()
        self._index: Any = WeakIdKeyDictionary()  # storage -> its number; None for one that was there before
        self._alive: dict[int, weakref.ref] = {}
        self.events: list[tuple[int, int]] = []  # (number, bytes), negative at the death
        self.kinds: list[str] = []
        self.origins: list[str] = []
        self.marks: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor.untyped_storage() for tensor in _plain((args, kwargs))]
        made = func(*args, **(kwargs or {}))
        for storage in given:
            if storage not in self._index:
                self._index[storage] = None
        for tensor in _plain(made):
            if tensor.untyped_storage() not in self._index:
                self._born(tensor.untyped_storage(), str(func.overloadpacket))
        return made

    def _born(self, storage: torch.UntypedStorage, operation: str) -> None:
        number, size = len(self.kinds), storage.nbytes()
        kind, place = _origin()
        self._index[storage] = number
        self.kinds.append(kind)
        self.origins.append(f"{place} {operation}")
        self.events.append((number, size))

        def died(_: Any) -> None:
            del self._alive[number]
            self.events.append((number, -size))

        self._alive[number] = weakref.ref(storage, died)

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what the storage of `tensor` is for, from its birth on."""
        number = self._index.get(tensor.untyped_storage())
        if number is not None:
            self.kinds[number] = kind

    def label_gradients(self, model: nn.Module) -> None:
        """Have the gradients of parameters labelled where they arrive; FSDP's gathered parameters too.

        Parameters are looked up when their module runs, since FSDP registers the gathered ones only then.
        """
        seen: Any = WeakIdKeyDictionary()

        def watch(module: nn.Module, args: Any) -> None:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen[parameter] = True
                    parameter.register_hook(lambda grad: self.label(grad, "gradient"))
                    parameter.register_post_accumulate_grad_hook(lambda p: self.label(p.grad, "gradient"))

        for module in model.modules():
            module.register_forward_pre_hook(watch)

    def label_parts_of_gradients(self, loss: Tensor) -> None:
        """Have the gradients labelled that are still to be added up, where a parameter was used more than once."""
        seen: set[Any] = set()
        nodes = [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for place, (following, _) in enumerate(node.next_functions):
                if following is not None and following.name().endswith("AccumulateGrad"):
                    node.register_hook(partial(self._label_part, place))
                nodes.append(following)

    def _label_part(self, place: int, gradients: Any, _: Any) -> None:
        if gradients[place] is not None:
            self.label(gradients[place], "gradient")

    def mark(self, name: str) -> None:
        """Remember this moment."""
        self.marks[name] = len(self.events)

    def curve(self, *kinds: str) -> list[int]:
        """Live bytes of these kinds (none: of all) after each event."""
        total, values = 0, []
        for number, size in self.events:
            total += size if not kinds or self.kinds[number] in kinds else 0
            values.append(total)
        return values

    def at(self, mark: str, *kinds: str) -> int:
        """Live bytes at a mark."""
        return self.curve(*kinds)[self.marks[mark] - 1] if self.marks[mark] else 0

    def peak(self, *kinds: str) -> tuple[int, int]:
        """Most live bytes, and the number of events until then."""
        curve = self.curve(*kinds)
        best = max(range(len(curve)), key=curve.__getitem__)
        return curve[best], best + 1

    def largest(self, end: int, count: int, *kinds: str) -> dict[str, int]:
        """What was live after `end` events, in bytes by the code that made it, largest first."""
        sizes: Counter[str] = Counter()
        for number, size in self.events[:end]:
            if not kinds or self.kinds[number] in kinds:
                sizes[self.origins[number]] += size
        return {origin: size for origin, size in sizes.most_common(count) if size}
