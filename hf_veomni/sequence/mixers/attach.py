"""Install the schemes on a stack's mixers: their forwards, the row that they work on, and its way into recomputation.

decoder stack     pre-hook    sets the row: documents, or none with a cache
  mixer           forward     exchanges, runs the family's own functions by document, exchanges back
decoder stack     post-hook   forgets the row
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_veomni import hf
from hf_veomni.context import current
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.mixers.row import CarriedCheckpoint, LinearRow, current_row
from hf_veomni.sequence.mixers.table import FunctionRegistry, Mixer, run_mixer
from hf_veomni.sequence.shard import shard_sequence

# What Zamba's layers take beside the hidden states: the embeddings of the row, which the stack hands to each of them.
_ORIGINAL = "original_hidden_states"
_registry = FunctionRegistry()


def _cut_original(
    state: ParallelState, place: int, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Cut the embeddings [B, S, *] of the full row for a layer that sees [B, s, *]."""
    row, given = current_row.get(), kwargs.get(_ORIGINAL, args[place] if len(args) > place else None)
    if row is None or row.documents is None or given is None or given.shape[1] != row.documents.row_length:
        return None
    local = shard_sequence(given, 1, state)
    if _ORIGINAL in kwargs:
        return args, {**kwargs, _ORIGINAL: local}
    return (*args[:place], local, *args[place + 1 :]), kwargs


class LinearAttachment:
    """Linear attention on one stack; `detach` takes it off again."""

    def __init__(self, decoder: nn.Module, mixers: Sequence[Mixer], state: ParallelState) -> None:
        """Install. The hooks must come after those that set the documents."""
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
        for module in decoder.modules() if state.sp_size > 1 else ():
            names = list(inspect.signature(type(module).forward).parameters)
            if _ORIGINAL in names:
                hook = partial(_cut_original, state, names.index(_ORIGINAL) - 1)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

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
        _registry.acquire(self, self._callers())  # kernels may have been put in place since
        for module in self._checkpointed:
            hf.wrap_checkpointing(module, CarriedCheckpoint)
        self._tokens.append(current_row.set(LinearRow(current().documents)))

    def _leave(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if not self._tokens:
            return
        row = current_row.get()
        current_row.reset(self._tokens.pop())
        if output is not None and row is not None and not row.calls:  # None: an error is on its way
            raise ValueError(
                f"None of the modules of {type(decoder).__name__} that mix tokens by themselves was called, "
                f"`{self.mixers[0].name}` among them: the model has put others in their place since `prepare_omni`, "
                "which would mix the tokens of a slice alone. Load it so that it keeps them (BigBird: with "
                "attention_type='original_full')."
            )
