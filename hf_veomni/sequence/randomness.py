"""Random streams: data order is the same on all ranks of an SP group, dropout is not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_veomni.context import current, enter, is_inside, leave
from hf_veomni.mesh import ParallelState


@contextmanager
def own_stream(device: torch.device, *key: object) -> Iterator[None]:
    """Draw torch's random numbers from a stream that `key` names, and leave the process-wide generators as they were.

    The ranks of an SP group hold different tokens of a row, so their dropout masks must differ; their samplers and
    collators must not. A stream that is a function of (seed, step, micro-batch, rank) gives both, and a resumed run
    draws the same masks without any stored state.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int.from_bytes(digest, "big"))
        yield


def _state(device: torch.device) -> bytes:
    """Of the generator that dropout on `device` draws from."""
    with unset_fake_temporarily():  # in a dry run, too, it has values
        of_cpu = device.type == "cpu"
        state = torch.get_rng_state() if of_cpu else torch.get_device_module(device).get_rng_state(device)
        return state.numpy().tobytes()


class _OwnDropout:
    """Gives each rank of an SP group, and each stage, a stream of its own while a model in training runs.

    The stream follows from the process-wide generator, which `set_seed` sets alike on all ranks, and from the rank. A
    forward that drew something moves that generator on, by the same on every rank; one that drew nothing leaves it.
    In a pipeline every forward moves it on: dropout of other stages is not seen here, and samplers, which draw from it
    too, must go on alike.
    """

    def __init__(self, state: ParallelState) -> None:
        self._device = state.device
        self._rank = state.sp_rank + state.pp_rank * state.sp_size
        self._staged = state.plan.pp_size > 1

    def enter(self, module: nn.Module, args: object) -> None:
        if module.training:
            stack = ExitStack()
            stack.enter_context(own_stream(self._device, _state(self._device), self._rank))
            enter(self, dropout=(stack, _state(self._device)))

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        if not is_inside(self):
            return
        stack, begun = current().dropout
        leave(self)
        drew = self._staged or _state(self._device) != begun
        stack.close()
        if drew:
            torch.rand(1, device=self._device)


def attach_dropout(model: nn.Module, state: ParallelState) -> Callable[[], None]:
    """Let the ranks of an SP group, which hold different tokens, and the stages of a pipeline draw different dropout
    masks.

    Returns:
        A function that takes this off again.
    """
    own = _OwnDropout(state)
    handles = [
        model.register_forward_pre_hook(own.enter),
        model.register_forward_hook(own.leave, always_call=True),
    ]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
