"""How often the host waits for the device: by call site, on a CUDA device or, by where values come from, on the CPU.

On CUDA `torch.cuda.set_sync_debug_mode` says it. On the CPU it follows what would lie on a device: the inputs
handed to `SyncCounter.place`, whatever is made with an explicit `device`, what collectives return, and everything
computed from these. Counted is

    reads      values of these that the host asks for: `item` and `bool`, `tolist`, `cpu`, `numpy`, and operations
               whose result has a size that depends on values: `nonzero`, boolean indices, `unique` ...
    uploads    host values put on the device by a copy that the host waits for: `torch.tensor(list, device=...)`,
               `.to(device)` without `non_blocking`

A read of a host tensor, which a plain counter of `tolist` would count, is none. Not seen: what a C++ kernel reads by
itself, and copies into host buffers by `copy_`.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hf_veomni.host import Remembered

READ, UPLOAD = "read", "upload"
_STATES = "hf_veomni/sequence/randomness.py"  # of generators, which lie on the host whatever the device
_PACKAGES = ("/hf_veomni/", "/transformers/", "/accelerate/", "/peft/", "/torch/")
_MACHINERY = ("/torch/_dynamo/", "/torch/overrides", "/torch/utils/_", "/_syncs")
_TO_HOST = {"tolist", "cpu", "numpy", "__array__"}
_FACTORIES = ("tensor", "as_tensor", "from_numpy", "arange", "zeros", "ones", "empty", "full", "rand", "randn")
_BY_VALUE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
_BY_VALUE |= {"equal", "bincount", "repeat_interleave"}


def _plain(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if type(x) in (Tensor, nn.Parameter, Remembered)]


def _site() -> str:
    """The calling line: the innermost one of the package or of transformers, else of torch."""
    frame, fallback = sys._getframe(2), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        for key in _PACKAGES:
            if key in name and not any(part in name for part in _MACHINERY):
                place = f"{name[name.rindex(key) + 1 :]}:{frame.f_lineno}"
                if key != "/torch/":
                    return place
                fallback = place if fallback == "?" else fallback
                break
        frame = frame.f_back
    return fallback


class SyncCounter:
    """Context in which waits for the device are counted, by kind, phase and call site.

    Attributes:
        found: (phase, kind, site) -> how often.
        phase: under which the next ones are counted; set it as the step goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.phase = "forward"
        self._on_device: set[int] = set()  # addresses of storages
        self._stack = ExitStack()

    def __enter__(self) -> SyncCounter:
        if self.device.type == "cuda":
            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._warned  # type: ignore[assignment]  # put back by catch_warnings
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            self._stack.enter_context(_Operations(self))
            self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def count(self, kind: str | None = None, phase: str | None = None) -> int:
        return sum(n for (p, k, _), n in self.found.items() if kind in (None, k) and phase in (None, p))

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as a loader hands it over: on the device. Not counted."""
        counted = self.found.copy()
        placed = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.found = counted
        return placed

    def note(self, kind: str) -> None:
        site = _site()
        if self.device.type != "cpu" or not site.startswith(_STATES):
            self.found[self.phase, kind, site] += 1

    def mark(self, values: Any) -> None:
        """What lies on the device."""
        self._on_device.update(tensor.untyped_storage()._cdata for tensor in _plain(values))

    def unmark(self, values: Any) -> None:
        """What was made on the host, maybe where a storage of the device has been freed."""
        self._on_device.difference_update(tensor.untyped_storage()._cdata for tensor in _plain(values))

    def holds(self, values: Any) -> bool:
        return any(tensor.untyped_storage()._cdata in self._on_device for tensor in _plain(values))

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values on the host."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            made = tensor.clone()
        self.unmark(made)
        return made

    def _warned(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.note(READ)


class _Operations(TorchDispatchMode):
    """Follows values through operations, those of the backward included."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        collective = func.namespace == "c10d"
        fresh = func is torch.ops.aten.lift_fresh.default  # of a list: its storage may be where another has been
        given = not fresh and self.counter.holds((args, kwargs))
        if given and _depends_on_values(func, args, kwargs):
            self.counter.note(READ)
        made = func(*args, **kwargs)
        if given or collective:
            self.counter.mark((made, args, kwargs) if collective else made)
        else:
            self.counter.unmark(made)
        return made


def _depends_on_values(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and func._overloadname == "Tensor"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        by_mask = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return by_mask and (name == "index" or args[2].numel() != 1)  # one value is filled in without a look
    return name in _BY_VALUE


class _Calls:
    """What no operation of the dispatcher shows on the CPU: reads by Python, and explicit devices.

    Methods of `Tensor` and functions of `torch` are replaced: a TorchFunctionMode is off in the backward.
    """

    def __init__(self, counter: SyncCounter) -> None:
        self.counter = counter
        self._patches: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        wrappers = [(Tensor, name, self._read) for name in _TO_HOST]
        wrappers += [(Tensor, "new_tensor", self._make_like)]
        wrappers += [(Tensor, name, self._move) for name in ("to", "cuda")]
        wrappers += [(torch, name, self._make) for name in _FACTORIES]
        for owner, name, wrapper in wrappers:
            self._patches.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, wrapper(getattr(owner, name)))

    def __exit__(self, *error: Any) -> None:
        for owner, name, own in self._patches:
            if own is None:
                delattr(owner, name)  # inherited
            else:
                setattr(owner, name, own)

    def _read(self, function: Any) -> Any:
        @wraps(function)
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.counter.holds(tensor):
                self.counter.note(READ)
                tensor = self.counter.copy(tensor)
            return function(tensor, *args, **kwargs)

        return read

    def _make(self, function: Any) -> Any:
        @wraps(function)
        def make(*args: Any, **kwargs: Any) -> Any:
            from_host = not self.counter.holds(args[:1])
            made = function(*args, **kwargs)
            if not isinstance(kwargs.get("device"), torch.device):
                if from_host and function.__name__ == "from_numpy":
                    self.counter.unmark(made)
            elif from_host:
                if function.__name__ in ("tensor", "as_tensor"):
                    self.counter.note(UPLOAD)
                    made = self.counter.copy(made)
                self.counter.mark(made)
            return made

        return make

    def _make_like(self, function: Any) -> Any:
        @wraps(function)
        def make(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            made = function(tensor, *args, **kwargs)
            if self.counter.holds(tensor):
                self.counter.note(UPLOAD)
                self.counter.mark(made)
            return made

        return make

    def _move(self, function: Any) -> Any:
        @wraps(function)
        def move(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            target = kwargs.get("device", args[0] if args else None)
            held = self.counter.holds(tensor)
            if held and target == "cpu":
                self.counter.note(READ)
                tensor = self.counter.copy(tensor)
            made = function(tensor, *args, **kwargs)
            if held or not _plain(made) or not isinstance(target, torch.device):
                return made
            if not (kwargs.get("non_blocking") or True in args[1:]):
                self.counter.note(UPLOAD)
            made = self.counter.copy(made) if made is tensor else made
            self.counter.mark(made)
            return made

        return move
