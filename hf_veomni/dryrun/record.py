"""Watches one training step from below: each operator, what it makes, and which module it runs in."""

from __future__ import annotations

import gc
import inspect
import re
from contextlib import ExitStack
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_veomni.dryrun.memory import MemoryLog, Place
from hf_veomni.dryrun.traffic import WRITES, TrafficLog

_LOSS, _TRIES = "/hf_veomni/loss/", "/torch/distributed/tensor/_sharding_prop.py"
_GATHERS, _SCATTERS = "fsdp::all_gather_copy_in", ("fsdp::chunk_cat", "aten::_chunk_cat")
_FILLS = "fsdp::split_with_sizes_copy"


@cache
def _general(name: str) -> str:
    """ "model.layers.*.mlp" of "model.layers.3.mlp"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _origin() -> str | None:
    """Category of what the code that runs makes; None for shapes that DTensor tries on tensors of its own."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if _LOSS in name:
            return "loss"
        if name.endswith(_TRIES):
            return None
        frame = frame.f_back
    return "activations"


class StepRecorder(TorchDispatchMode):
    """Context in which the memory and the collectives of a model's step are written down.

    Attributes:
        phase: what the step is doing; set it from outside.
    """

    def __init__(self, model: nn.Module, axes: dict[str, str], fake: bool) -> None:
        super().__init__()
        self.memory, self.traffic = MemoryLog(fake), TrafficLog(axes)
        self.phase = "before"
        self._model = model
        self._names = {module: _general(name) for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._exits = ExitStack()

    def __enter__(self) -> StepRecorder:
        self._exits.enter_context(self.memory.watch_resizes())
        if gc.isenabled():  # when it next collects depends on what else is in the process: the peak is to be the same
            gc.disable()
            self._exits.callback(gc.enable)
        for handle in (
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ):
            self._exits.callback(handle.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._exits.close()

    def _begin(self, module: nn.Module, args: object) -> None:
        self._stack.append(module)

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if module in self._stack:  # not, where the hook before it has not run
            while self._stack.pop() is not module:
                pass

    @property
    def module(self) -> str:
        """The innermost module that runs."""
        return next((self._names[m] for m in reversed(self._stack) if m in self._names), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators come here
        name = func._schema.name
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        memory = self.memory
        new = [x for x in tree_leaves(made) if memory.counts(x)]
        if new:
            self._note(name, new)
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._note(name, [x for x in tree_leaves(args) if memory.counts(x)])
            self.traffic.see(name, args, made)
            written = tree_leaves(args[0]) if name in WRITES else []
            memory.label([x for x in written if memory.category(x) == "activations"], "communication")
        elif name == _GATHERS:
            memory.label(new, "communication")
        elif name == _FILLS:
            memory.label(kwargs.get("out") or args[3], "gathered")
        elif name in _SCATTERS:
            memory.label(args[0], "gradients")
            memory.label([kwargs["out"]] if "out" in kwargs else new, "communication")
        return made

    def _note(self, name: str, tensors: list[Tensor]) -> None:
        fresh = [x for x in tensors if self.memory.category(x) is None]
        if not fresh:
            return
        category = _origin()
        if category is None:
            return
        place = Place(self.phase, self.module, name)
        for tensor in fresh:
            self.memory.born(tensor, place, category)

    def note_owned(self, optimizer: Any = None) -> None:
        """Label parameters, buffers, gradients and states of the optimizer that there are now."""
        names = {p: n for n, p in self._model.named_parameters()}
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            self._own(tensor, "parameters", name)
            if tensor.grad is not None:
                self._own(tensor.grad, "gradients", name)
        for parameter, state in (optimizer.state if optimizer is not None else {}).items():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._own(value, "optimizer", names.get(parameter, ""))

    def _own(self, tensor: Tensor, category: str, name: str) -> None:
        tensor = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if self.memory.counts(tensor):
            module = _general(name.rpartition(".")[0])
            self.memory.born(tensor, Place("before", module, ""), category)
            self.memory.label([tensor], category, module)
