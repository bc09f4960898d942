"""Two sequences in flight: each runs in a greenlet, and while an exchange of one is under way the other one computes.

    first     compute | launch                 land | compute | launch                 land | ...
    second                     compute | launch                        land | compute | launch

    give_way    an exchange has been launched: the other one runs until it gives way in its turn
    park        the other one runs until it lets this one go on: neither gets further ahead than one unit of FSDP2
    meet        what happens once for both (the loss of a router): who comes first waits, who comes second does it for
                both
    checkpoint  what is computed again for the backward is so for both at once

One thread runs both, so each has what a thread has one of: ContextVars, grad mode, autocast, random streams, hooks on
what autograd saves. The backward needs no schedule: autograd runs the nodes that are ready newest first, and so the
interleaving of the forward comes back in reverse.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import _StopRecomputationError

from hf_veomni.context import within
from hf_veomni.errors import UnsupportedError

try:
    from greenlet import greenlet
except ImportError:  # an extra
    greenlet = None

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs lack it)

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


def _saving_hooks() -> Any:
    """The pair that sees what autograd saves now, the innermost of a stack that a thread has; None without any."""
    return _autograd._top_saved_tensors_default_hooks(True)


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
        found: by backbone that it is inside of, how it has found it switched.
    """

    other: Lane

    def __init__(self, call: Callable[[], Any], visit: Visit, parts: bool, active: bool) -> None:
        """`active`: whether it gives way from its beginning on, and not only within a prepared model."""
        self.call, self.parts, self.active = call, parts, active
        self.state = visit.state  # that it goes on with, while it does not run
        self.shared: list[Any] = []
        self.found: dict[object, Any] = {}
        self.frames: dict[object, list[_Frame]] = {}  # of checkpointing, which the other one has not come to
        self._around = _saving_hooks()
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
        if get_eval_frame_callback() not in (None, False):  # the compiler would go on in the other one
            raise UnsupportedError(
                "`overlap` ('pairs') cannot be combined with torch.compile around layers or exchanges, within which "
                "another sequence runs: compile modules inside of layers that exchange nothing, or leave `overlap` "
                "out of the plan."
            )
        self.state = _ThreadState.now()
        taken = [(shared, shared.take()) for shared in self.shared]
        saving = []
        while (hooks := _saving_hooks()) != self._around:
            saving.append(hooks)
            _autograd._pop_saved_tensors_default_hooks()
        try:
            self.other.greenlet.switch()
        finally:
            for hooks in reversed(saving):
                _autograd._push_saved_tensors_default_hooks(*hooks)
            for shared, values in taken:
                shared.put(values)
            self.state.restore()

    @property
    def other_runs(self) -> bool:
        """Whether the other sequence can go on: it has not ended, and does not wait for this one."""
        return not self.other.greenlet.dead and self.other.waits_for is None

    def give_way(self) -> None:
        """Run the other sequence until it gives way, waits for this one or ends; nothing where it cannot run."""
        if self.other_runs:
            self._switch()

    def park(self, key: object) -> bool:
        """Wait until the other sequence calls `release(key)`. Returns whether it has: it may end or wait elsewhere."""
        self.waits_for = key
        while self.waits_for is key and self.other_runs:
            self._switch()
        released, self.waits_for = self.waits_for is None, None
        return released

    def release(self, key: object) -> None:
        """Let the other sequence go on, if that is what it waits for, when this one gives way."""
        if self.other.waits_for is key:
            self.other.waits_for = None

    def close(self) -> None:
        """Let go of what was run: both lanes refer to each other, and would keep it until garbage is collected."""
        del self.other, self.call
        self.result = self._visit = self._met = None
        self.shared, self.found, self.frames = [], {}, {}

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
            theirs, other._visit = other._visit, None
            assert theirs is not None
            self.release(key)
            other._met, mine = together(theirs, visit)
            other.state = theirs.state
            visit.state.restore()
            return mine
        if other.waits_for is None:
            self._visit = visit
            if self.park(key):
                met, self._met = self._met, None
                return met
            self._visit = None
        return alone(*visit.args, **visit.kwargs)

    def checkpoint(self, key: object, inner: Callable[..., Any], function: Callable[..., Any], *args: object) -> Any:
        """`inner(function, *args)`, a call of activation checkpointing.

        The other sequence's call under the same key is its partner: both are computed again side by side.

        Raises:
            UnsupportedError: reentrant checkpointing, whose recomputation is a backward of its own; one with contexts
                of its own, which would be left in another order than they were entered in.
        """
        given: Mapping[str, Any] = getattr(inner, "keywords", {})
        way_out = "or leave `overlap` out of the plan."
        if given.get("use_reentrant", False):
            raise UnsupportedError(
                "`overlap` ('pairs') cannot be combined with reentrant activation checkpointing: use "
                f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, {way_out}"
            )
        if "context_fn" in given:
            raise UnsupportedError(
                "`overlap` ('pairs') cannot be combined with activation checkpointing that has a `context_fn`: leave "
                f"it out of gradient_checkpointing_kwargs, {way_out}"
            )
        frame = _Frame(function)
        if waiting := self.other.frames.get(key):
            frame.join(waiting.pop(0))
        else:
            self.frames.setdefault(key, []).append(frame)
        return inner(frame, *args)


class _Begin(torch.autograd.Function):
    """Identity. To ask for what it saved, under activation checkpointing, is to have its frame computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        ctx.passed = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.passed = True
        return grads[0]


class _Frame:
    """What activation checkpointing runs for one sequence, and runs again for each backward, beside its partner.

    forward      first: frame    second: frame            each as it comes to it
    backward     the first to be asked for: first | second, one of which computes while the other one exchanges
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.partner: Callable[[], _Frame | None] = lambda: None
        self.begin: Callable[[], Any] = lambda: None  # its first node, as long as the graph is there
        self.ran = False
        self.backward = -1  # that it was last computed again for

    def join(self, other: _Frame) -> None:
        self.partner, other.partner = weakref.ref(other), weakref.ref(self)

    def __call__(self, *args: object) -> Any:
        again, self.ran = self.ran, True
        leaves, structure = tree_flatten(args)
        place = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad), None)
        if place is not None and torch.is_grad_enabled():
            leaves[place] = _Begin.apply(leaves[place])
            if not again:
                self.begin = weakref.ref(leaves[place].grad_fn)
        call = partial(self.function, *tree_unflatten(leaves, structure))
        return self._beside_partner(call) if again else call()

    def _beside_partner(self, call: Callable[[], Any]) -> Any:
        partner, self.backward = self.partner(), torch._C._current_graph_task_id()
        begin = None if partner is None or partner.backward == self.backward else partner.begin()
        if begin is None or begin.passed:
            return call()
        ended = False

        def mine() -> Any:
            nonlocal ended
            try:
                return call()
            except _StopRecomputationError:
                ended = True

        found, _ = run_both((mine, partial(getattr, begin, "saved_tensors")), (Visit(), Visit()))
        if ended:
            raise _StopRecomputationError
        return found


def _abandon(lanes: list[Lane], error: BaseException) -> None:
    """End those that have begun and not ended. What they raise in turn becomes a note of `error`."""
    for lane in lanes:
        while lane.greenlet:
            try:
                lane.greenlet.throw(_Abandoned())
            except Exception as other:
                error.add_note(f"When the other of two sequences was ended after this error, it raised {other!r}.")


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
    except BaseException as error:
        _abandon(lanes, error)
        raise
    finally:
        before.restore()
        found = lanes[0].result, lanes[1].result
        for lane in lanes:
            lane.close()
    for lane, visit in zip(lanes, visits, strict=True):
        visit.state = lane.state
    return found


def run_pair(function: Callable[[Any], Any], first: object, second: object, *, parts: bool = False) -> tuple[Any, Any]:
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
