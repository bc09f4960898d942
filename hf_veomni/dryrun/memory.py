"""Bytes of live tensors, storage by storage, from inside of PyTorch: no allocator, no resident set.

The birth, the death and every change of size of a storage are written down. What a storage is for is often known only
later (a gradient is one when it reaches its parameter), so categories are given afterwards, and the curve of each is
computed from what was written down. Scratch memory inside of a single kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "gathered", "loss", "communication")


class Place(NamedTuple):
    """Where the step is: phase ("forward", "backward", "optimizer"), module, and operator."""

    phase: str
    module: str
    operator: str


class Peak(NamedTuple):
    """Most bytes that were ever live.

    Attributes:
        total: bytes.
        categories: of these, by what they are for.
        modules: of these, by (category, the module in whose forward they were made); "" outside of every forward.
        place: what ran.
        largest: the largest tensors then: (bytes, category, place of birth).
    """

    total: int
    categories: dict[str, int]
    modules: dict[tuple[str, str], int]
    place: Place
    largest: list[tuple[int, str, Place]]


class MemoryLog:
    """Storages by number: category, place of birth, and all changes of size in order.

    Attributes:
        events: (number of the storage, change in bytes).
    """

    def __init__(self, fake: bool) -> None:
        """`fake`: whether the tensors that count are fake ones, and real ones the host's own."""
        self.fake = fake
        self.events: list[tuple[int, int]] = []
        self._index: Any = WeakIdKeyDictionary()  # storage -> its number
        self._alive: dict[int, weakref.ref] = {}
        self._sizes: list[int] = []
        self._categories: list[str] = []
        self._places: list[Place] = []

    def counts(self, value: object) -> bool:
        """Whether it is a tensor with memory of its own: wrappers (DTensor, lazy logits) only claim a size."""
        if self.fake:
            return isinstance(value, FakeTensor)
        return type(value) in (Tensor, torch.nn.Parameter)

    def born(self, tensor: Tensor, place: Place, category: str = "activations") -> None:
        """Write down the storage of `tensor` unless it is known."""
        storage = tensor.untyped_storage()
        if storage in self._index:
            return
        number = len(self._sizes)
        self._index[storage] = number
        self._sizes.append(0)
        self._categories.append(category)
        self._places.append(place)
        self._resize(number, storage.nbytes())
        self._alive[number] = weakref.ref(storage, lambda _, number=number: self._died(number))

    def _died(self, number: int) -> None:
        del self._alive[number]
        self._resize(number, 0)

    def _resize(self, number: int, size: int) -> None:
        if size != self._sizes[number]:
            self.events.append((number, size - self._sizes[number]))
            self._sizes[number] = size

    def label(self, tensors: Iterable[Any], category: str, module: str | None = None) -> None:
        """Say what the storages of tensors are for, from their birth on, and whose they are."""
        for tensor in tensors:
            number = self._index.get(tensor.untyped_storage()) if self.counts(tensor) else None
            if number is not None:
                self._categories[number] = category
                if module is not None:
                    self._places[number] = self._places[number]._replace(module=module)

    def category(self, tensor: Tensor) -> str | None:
        number = self._index.get(tensor.untyped_storage())
        return None if number is None else self._categories[number]

    @contextmanager
    def watch_resizes(self) -> Iterator[None]:
        """FSDP2 frees and fills gathered parameters by resizing their storages, which no operator tells of."""
        stock = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            found = stock(storage, size)
            if (number := self._index.get(storage)) is not None:
                self._resize(number, size)
            return found

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = stock  # type: ignore[method-assign]

    def highest(self, begin: int, phase: str) -> int:
        """Most live bytes while something was made in this phase, after the first `begin` events."""
        total, best = sum(size for _, size in self.events[:begin]), 0
        for number, size in self.events[begin:]:
            total += size
            if size > 0 and self._places[number].phase == phase:
                best = max(best, total)
        return best

    def live(self, end: int | None = None) -> dict[str, int]:
        """Live bytes by category after `end` events (None: now)."""
        found: Counter[str] = Counter()
        for number, size in self.events[:end]:
            found[self._categories[number]] += size
        return {category: found[category] for category in CATEGORIES}

    def peak(self, begin: int = 0, count: int = 24) -> Peak:
        """The highest point after the first `begin` events."""
        total, best, end = sum(size for _, size in self.events[:begin]), -1, begin
        for place, (_, size) in enumerate(self.events[begin:], begin + 1):
            total += size
            if total > best:
                best, end = total, place
        sizes: Counter[int] = Counter()
        for number, size in self.events[:end]:
            sizes[number] += size
        modules: Counter[tuple[str, str]] = Counter()
        for number, size in sizes.items():
            modules[self._categories[number], self._places[number].module] += size
        last = self._places[self.events[end - 1][0]] if end else Place("", "", "")
        largest = [(size, self._categories[n], self._places[n]) for n, size in sizes.most_common(count) if size]
        kept = {key: size for key, size in modules.most_common() if size}
        return Peak(sum(sizes.values()), self.live(end), kept, last, largest)
