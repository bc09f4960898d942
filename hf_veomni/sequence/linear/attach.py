"""Install the schemes on a stack's mixers: their forwards, the row that they work on, and its way into recomputation.

decoder stack     pre-hook    sets the row: documents, or none with a cache
  mixer           forward     exchanges, runs the family's own functions by document, exchanges back
decoder stack     post-hook   forgets the row
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.documents import current_documents
from hf_veomni.sequence.linear.mixers import FunctionRegistry, Mixer, run_mixer
from hf_veomni.sequence.linear.row import CarriedCheckpoint, LinearRow, current_row

_registry = FunctionRegistry()


class LinearAttachment:
    """Linear attention on one stack; `detach` takes it off again."""

    def __init__(self, decoder: nn.Module, mixers: Sequence[Mixer], state: ParallelState) -> None:
        """Install. The hooks must come after those that set `current_documents`."""
        self.decoder, self.mixers = decoder, tuple(mixers)
        self._checkpointed = [module for module in decoder.modules() if hasattr(module, "gradient_checkpointing")]
        _registry.acquire(self, self._callers())
        for mixer in mixers:
            mixer.module.forward = partial(run_mixer, mixer.module, mixer.scheme, state)
        self._tokens: list[Any] = []
        self._handles = [
            decoder.register_forward_pre_hook(self._enter),
            decoder.register_forward_hook(self._leave, always_call=True),
        ]

    def _callers(self) -> list[nn.Module]:
        return [mixer.module for mixer in self.mixers if mixer.scheme == "functions"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy of the model has a copy of this, which is a user of its own."""
        vars(self).update(state)
        _registry.acquire(self, self._callers())

    def detach(self) -> None:
        """Remove hooks and forwards, and free the modelling files' functions after the last model."""
        for handle in self._handles:
            handle.remove()
        for mixer in self.mixers:
            mixer.module.__dict__.pop("forward", None)
        for module in self._checkpointed:
            hf.restore_checkpointing(module, CarriedCheckpoint)
        _registry.release(self)

    def _enter(self, decoder: nn.Module, args: tuple) -> None:
        for module in self._checkpointed:
            hf.wrap_checkpointing(module, CarriedCheckpoint)
        self._tokens.append(current_row.set(LinearRow(current_documents.get())))

    def _leave(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if self._tokens:
            current_row.reset(self._tokens.pop())
