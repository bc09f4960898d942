"""Hooks around the forward of a sharded model: what users call beside it, and what stays gathered after it.

Beside it they call embeddings for `inputs_embeds`, the backbone, the head. FSDP2 takes the module that runs first for
the root of all, gathers what belongs to the root in the root's forward, and reduces its gradients once those of the
root's inputs are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError

_HELD, RAN = "_omni_held", "_omni_ran"


def watch_parts(model: PreTrainedModel) -> None:
    """Let a sharded model's input embeddings, backbone and head run before its forward, after it and without it.

    Collective of such a call: an all-gather of the parameters that belong to the root, as a forward of the model has.
    They stay gathered until the next backward, or forward without gradients.
    """
    watch = _Watch(model)
    callers: dict[Any, None] = dict.fromkeys([model, model.base_model, hf.find_backbone(model)])
    for caller in callers:
        caller.register_forward_pre_hook(watch.enter, prepend=True)
        caller.register_forward_hook(watch.leave, always_call=True)
    get_ready: Any = torch.compiler.disable(watch.get_ready)
    for part in dict.fromkeys([*callers, model.get_output_embeddings(), watch.embeddings]):
        if isinstance(part, nn.Module) and part is not model:
            part.register_forward_pre_hook(get_ready, prepend=True)  # before FSDP2's own


class _Watch:
    def __init__(self, model: Any) -> None:
        self.model, self.running = model, 0
        self.embeddings: nn.Module | None = None
        try:
            self.embeddings = model.get_input_embeddings()
        except NotImplementedError:  # of audio clips
            pass

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = max(0, self.running - 1)  # called too where a hook raised before `enter`

    def get_ready(self, module: nn.Module, args: Any) -> None:
        if self.running:
            return
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        if module is self.embeddings and trained and not isinstance(module, FSDPModule):
            name = next(name for name, part in self.model.named_modules() if part is module)
            kind = type(self.model).__name__.removeprefix("FSDP")
            raise UnsupportedError(
                f"'{name}' of {kind} was called outside of the model's forward, and its gradient would be lost, since "
                f"it is sharded with the root: make it a unit of its own by a rule of the plan, "
                f"{{'modules': {{'{name}': {{'fsdp': 'keep'}}}}}}, or pass `input_ids` to the model."
            )
        self.model._get_fsdp_state()._lazy_init()
        self.model.unshard()


def reshard_after_inference(model: Any, args: Any, output: Any) -> None:
    """Without a backward nothing would free the kept units: parameters would stay unsharded after an evaluation."""
    setattr(model, RAN, True)
    flight = current().flight
    if flight is not None and hf.find_backbone(model) in flight.other.found:  # the other one is in its layers
        return
    if not torch.is_grad_enabled() and not getattr(model, _HELD, False):
        _reshard(model)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Within this context the kept units (the head) stay gathered after a forward without gradients, for logits that
    somebody looks at later."""
    base: Any = hf.base_model(model)
    outer = getattr(base, _HELD, False)
    setattr(base, _HELD, True)
    try:
        yield
    finally:
        setattr(base, _HELD, outer)
        if not outer:
            _reshard(base)
