"""Two sequences in flight: each runs in a greenlet, and while an exchange of one is under way the other one computes.

    first     compute | launch                 land | compute | launch                 land | ...
    second                     compute | launch                        land | compute | launch

    give_way    an exchange has been launched: the other one runs until it gives way in its turn
    meet        what happens once for both (a unit of FSDP2, a frame of activation checkpointing): who comes first
                waits, who comes second does it for both

One thread runs both, so each has what a thread has one of: ContextVars, grad mode, autocast, random streams. The
backward needs no schedule: autograd runs the nodes that are ready newest first, and so the interleaving of the forward
comes back in reverse.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hf_veomni.context import within
from hf_veomni.errors import UnsupportedError

try:
    from greenlet import greenlet
except ImportError:  # an extra
    greenlet = None

Calls = tuple[Callable[[], Any], Callable[[], Any]]


def check_greenlet() -> None:
    """Raise UnsupportedError where the package that pairs need is missing."""
    if greenlet is None:
        raise UnsupportedError(
            "`overlap` ('pairs') needs the package greenlet, which is not installed: "
            "`pip install 'hf-veomni[overlap]'`, or leave `overlap` out of the plan."
        )


@lru_cache(maxsize=1)
def _devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def _random(device: str) -> Any:
    return torch.random if device == "cpu" else torch.get_device_module(device)


@dataclass(frozen=True)
class _ThreadState:
    """What a thread has one of and each sequence its own; ContextVars come with the greenlet."""

    grad: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    random: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> _ThreadState:
        devices = _devices()
        return cls(
            torch.is_grad_enabled(),
            tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices),
            tuple(_random(device).get_rng_state() for device in devices),
        )

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, (enabled, dtype), state in zip(_devices(), self.autocast, self.random, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
            _random(device).set_rng_state(state)

    def draws_as(self, other: _ThreadState) -> bool:
        return all(torch.equal(mine, its) for mine, its in zip(self.random, other.random, strict=True))

    def drawn_once(self) -> _ThreadState:
        """The same with the random streams one draw further."""
        before = self.now()
        self.restore()
        for device in _devices():
            torch.rand(1, device=device)
        further = self.now()
        before.restore()
        return further


@dataclass(eq=False)
class Visit:
    """A call that a sequence has come to, with the state in which it came."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    state: _ThreadState = field(default_factory=_ThreadState.now)


class _Abandoned(Exception):
    """Thrown into a sequence whose partner has raised, so that its hooks and blocks end as after any error."""


class Lane:
    """One of two sequences in flight.

    Attributes:
        parts: whether both are parts of one batch.
        shared: what both have one of beside the thread's: `take()` before the other one runs, `put(taken)` after it.
    """

    other: Lane

    def __init__(self, call: Callable[[], Any], visit: Visit, parts: bool, active: bool) -> None:
        """`active`: whether it gives way from its beginning on, and not only within a prepared model."""
        self.call, self.parts, self.active = call, parts, active
        self.state = visit.state  # that it goes on with, while it does not run
        self.shared: list[Any] = []
        self.waits_for: object = None
        self._visit, self._met, self.result = visit, None, None
        assert greenlet is not None
        self.greenlet: Any = greenlet(self._run)
        self.greenlet.gr_context = visit.context

    def _run(self) -> None:
        self.state.restore()
        try:
            with within(flight=self, lane=self if self.active else None):
                self.result = self.call()
        except _Abandoned:
            pass
        finally:
            self.state = _ThreadState.now()

    def _switch(self) -> None:
        self.state = _ThreadState.now()
        taken = [(shared, shared.take()) for shared in self.shared]
        try:
            self.other.greenlet.switch()
        finally:
            for shared, values in taken:
                shared.put(values)
            self.state.restore()

    def give_way(self) -> None:
        """Run the other sequence until it gives way, waits for this one or ends; nothing where it cannot run."""
        if not self.other.greenlet.dead and self.other.waits_for is None:
            self._switch()

    def meet(
        self, key: object, visit: Visit, together: Callable[[Visit, Visit], tuple], alone: Callable[..., Any]
    ) -> Any:
        """This sequence's part of `together(first visit, second visit)`, called once both have come here.

        Args:
            key: what both come to.
            alone: called with the visit's arguments where the other one has ended or waits elsewhere.
        """
        other = self.other
        if other.waits_for is key and not other.greenlet.dead:
            theirs, other.waits_for = other._visit, None
            other._met, mine = together(theirs, visit)
            other.state = theirs.state
            visit.state.restore()
            return mine
        if other.waits_for is None:
            self.waits_for, self._visit = key, visit
            while self.waits_for is not None and not other.greenlet.dead and other.waits_for is None:
                self._switch()
            if self.waits_for is None:
                met, self._met = self._met, None
                return met
            self.waits_for = None
        return alone(*visit.args, **visit.kwargs)

    def checkpoint(self, key: object, inner: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """`inner(function, *args)`, a call of activation checkpointing, in one frame for both sequences.

        Frames nest: what a sequence saves while it interrupts the frame of another one would be looked for there.

        Raises:
            UnsupportedError: reentrant checkpointing, which does not record what it is given by way of others.
        """
        if getattr(inner, "keywords", {}).get("use_reentrant", False):
            raise UnsupportedError(
                "`overlap` ('pairs') cannot be combined with reentrant activation checkpointing: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or leave `overlap` out of the plan."
            )
        return self.meet(key, Visit((function, *args)), partial(_checkpoint_both, inner), inner)


class _Both:
    """What one frame of activation checkpointing runs for both sequences, and runs again for each backward."""

    def __init__(self, first: Visit, second: Visit) -> None:
        self.visits, self.states = (first, second), (first.state, second.state)
        self.functions = first.args[0], second.args[0]
        self.split = len(first.args) - 1
        first.args, second.args = (), ()  # the frame keeps them
        self.ran = False

    def __call__(self, *args: Any) -> tuple[Any, Any]:
        calls = partial(self.functions[0], *args[: self.split]), partial(self.functions[1], *args[self.split :])
        visits = self.visits
        if self.ran:
            visits = tuple(Visit(state=state) for state in self.states)
        self.ran, self.visits = True, ()
        return run_both(calls, visits)


def _checkpoint_both(inner: Callable[..., Any], first: Visit, second: Visit) -> tuple[Any, Any]:
    args = *first.args[1:], *second.args[1:]
    return inner(_Both(first, second), *args)


def run_both(calls: Calls, visits: tuple[Visit, ...], parts: bool = False, active: bool = True) -> tuple[Any, Any]:
    """Results of both calls, each in the state of its visit, which becomes that in which it has ended.

    The first one runs until it gives way. An error in one ends both, and is raised here.
    """
    lanes = [Lane(call, visit, parts, active) for call, visit in zip(calls, visits, strict=True)]
    lanes[0].other, lanes[1].other = lanes[1], lanes[0]
    before = _ThreadState.now()
    try:
        for lane in lanes:
            while not lane.greenlet.dead:
                lane.greenlet.switch()
    finally:
        for lane in lanes:
            while lane.greenlet:  # has begun and not ended
                lane.greenlet.throw(_Abandoned())
        before.restore()
    for lane, visit in zip(lanes, visits, strict=True):
        visit.state = lane.state
    return lanes[0].result, lanes[1].result


def run_pair(function: Callable[[Any], Any], first: Any, second: Any, *, parts: bool = False) -> tuple[Any, Any]:
    """`function(first), function(second)`, two sequences in flight within the models of a plan with `overlap: pairs`.

    Results, gradients and errors are those of one call after the other; only dropout draws other masks. For the
    interleaving to come back in the backward, let it begin once for both: `(first_loss + second_loss).backward()`.

    Args:
        function: calls prepared models; collectives of its own have the same order on all ranks.
        first, second: one batch each.
        parts: they are parts of one batch, over which a router's loss is computed as a whole.

    Collectives: those of the models, in the same order on all ranks: every rank calls it, or none does.

    Raises:
        UnsupportedError: the package greenlet is not installed.
    """
    check_greenlet()
    begin = _ThreadState.now()
    further = begin.drawn_once()
    visits = Visit(state=begin), Visit(state=further)
    found = run_both((partial(function, first), partial(function, second)), visits, parts, active=False)
    if not (visits[0].state.draws_as(begin) and visits[1].state.draws_as(further)):
        visits[1].state.restore()
    return found
