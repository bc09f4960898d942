"""Install the schemes on a backbone's mixers.

  mixer           forward     exchanges, runs the family's own functions by document, exchanges back
backbone          post-hook   checks that one of them was called
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_veomni.context import Row, current
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.sequence.mixers.table import FunctionRegistry, Mixer, run_mixer
from hf_veomni.sequence.shard import shard_sequence

# What Zamba's layers take beside the hidden states: the embeddings of the row, which the backbone hands to each of
# them.
_ORIGINAL = "original_hidden_states"
_registry = FunctionRegistry()


def _cut_original(
    state: ParallelState, place: int, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Cut the embeddings [B, S, *] of the full row for a layer that sees [B, s, *]."""
    documents, given = current().documents, kwargs.get(_ORIGINAL, args[place] if len(args) > place else None)
    if documents is None or given is None or given.shape[1] != documents.row_length:
        return None
    local = shard_sequence(given, 1, state)
    if _ORIGINAL in kwargs:
        return args, {**kwargs, _ORIGINAL: local}
    return (*args[:place], local, *args[place + 1 :]), kwargs


class LinearAttachment:
    """Linear attention on one backbone; `detach` takes it off again."""

    def __init__(self, decoder: nn.Module, mixers: Sequence[Mixer], state: ParallelState) -> None:
        """Install; `enter` and `check_called` are for each forward."""
        self.decoder, self.mixers = decoder, tuple(mixers)
        _registry.acquire(self, self._callers())
        for mixer in mixers:
            mixer.module.forward = partial(run_mixer, mixer.module, mixer.scheme, state)
        self._handles: list[Any] = []
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
        _registry.release(self)

    def enter(self) -> None:
        """Before each forward of the backbone."""
        _registry.acquire(self, self._callers())  # kernels may have been put in place since

    def _is_here(self) -> bool:
        """Whether some of the modules belong to this rank's stage of a pipeline."""
        here = set(self.decoder.modules())
        return any(mixer.module in here for mixer in self.mixers)

    def check_called(self, row: Row) -> None:
        """Raises UnsupportedError where the forward that worked on `row` has called no mixer."""
        if not row.mixer_calls and self._is_here():
            raise UnsupportedError(
                f"None of the modules of {type(self.decoder).__name__} that mix tokens by themselves was called, "
                f"`{self.mixers[0].name}` among them: the model has put others in their place since `prepare_omni`, "
                "which would mix the tokens of a slice alone. Load it so that it keeps them (BigBird: with "
                "attention_type='original_full')."
            )
