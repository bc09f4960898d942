"""All-to-all along the first dimension, with uneven splits and its gradient, in two phases.

    forward     launch: the exchange starts            land: waits, hands out what arrived
    backward    launch: waits, hands out the gradient  land: the gradient's exchange starts

What runs between `launch` and `land` has its backward between the phases of the backward, since autograd runs the
nodes that are ready newest first. The blocking form is both with nothing in between but `give_way`.

A process group carries the data. Whatever has the two methods of `Transport` can stand in for it while a forward runs,
its backward and recomputations included:

    with within(transport=link):  # hf_veomni.context
        loss = model(**batch).loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_veomni.context import current

F = TypeVar("F", bound=Callable[..., Any])


def _uncompiled(function: F) -> F:
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class Transport(Protocol):
    def start(self, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Any:
        """Begin to send `send[r]` leading rows of local x [sum(send), ...] to each rank r of `group`.

        All ranks of the group start their exchanges in the same order; several may be under way.

        Returns:
            What `wait` takes, once. It keeps alive what the exchange reads and writes.
        """
        ...

    def wait(self, ticket: Any) -> Tensor:
        """Local [sum(receive), ...], blocks in rank order, as soon as what runs next may read it."""
        ...


class _GroupTransport:
    """Asynchronous work of a process group.

    NCCL moves the data on a stream of its own: it begins after what the current stream holds by then, and `wait` has
    the current stream wait for the event at its end, without stopping the host. Until then it holds on to both
    tensors, which takes the place of `record_stream`. gloo works in threads, for which `wait` stops the host.
    """

    def start(
        self, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Any, Tensor, Tensor]:
        x, out = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, x, list(receive), list(send), group=group, async_op=True)
        return work, x, out

    def wait(self, ticket: tuple[Any, Tensor, Tensor]) -> Tensor:
        work, _, out = ticket
        work.wait()
        return out


_GROUPS = _GroupTransport()


def running_transport() -> Transport:
    """That of the forward that runs."""
    return current().transport or _GROUPS


class _Phases:
    """One exchange and that of its gradient: what both nodes of the graph know of it."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        send: Sequence[int],
        receive: Sequence[int],
        meanwhile: Callable[[], Any] | None = None,
    ) -> None:
        self.transport, self.group, self.send, self.receive = running_transport(), group, tuple(send), tuple(receive)
        self.ticket: Any = None  # of the phase that is open, in the forward or in the backward
        self.meanwhile = meanwhile

    def start(self, x: Tensor, back: bool = False) -> None:
        """Begin the exchange of x, or its reverse."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self.ticket = self.transport.start(x, self.group, send, receive)

    def wait(self) -> Tensor:
        """What arrived. To be called once."""
        ticket, self.ticket = self.ticket, None
        return self.transport.wait(ticket)


class Flight:
    """An exchange from its launch to its landing.

    The nodes of the graph know its phases and not itself, which knows the graph: one that is never landed, as where a
    recomputation ends before, is freed with the graph behind it and needs no collector of cycles.
    """

    def __init__(self, phases: _Phases, link: Tensor | None = None) -> None:
        """`link`: empty; its autograd edge leads from `land` to `launch`. None where there is no gradient."""
        self.phases, self.link = phases, link

    def wait(self) -> Tensor:
        return self.phases.wait()


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, phases: _Phases) -> Tensor:
        ctx.phases = phases
        phases.start(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.phases.meanwhile is not None:
            ctx.phases.meanwhile()
        return ctx.phases.wait(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, phases: _Phases) -> Tensor:
        ctx.phases = phases
        return phases.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.phases.start(grads[0], back=True)
        return grads[0].new_empty(0), None


@_uncompiled
def launch(
    x: Tensor,
    group: dist.ProcessGroup,
    send: Sequence[int],
    receive: Sequence[int],
    meanwhile: Callable[[], Any] | None = None,
) -> Flight:
    """Start an exchange of blocks of leading rows between the ranks of `group`; `land` has its result.

    Args:
        x: local tensor [sum(send), ...]; block r, of `send[r]` rows, goes to rank r. Must not change until `land`.
        receive: rows that arrive from each rank; `receive[r]` here equals `send[me]` on rank r.
        meanwhile: called in the backward before it waits, while the gradient is under way.

    Collective: one all-to-all over `group`, which all ranks launch in the same order among their collectives. The
    backward waits for the reverse all-to-all, which that of `land` has started.
    """
    phases = _Phases(group, send, receive, meanwhile)
    return Flight(phases, _Launch.apply(x, phases))


@_uncompiled
def land(flight: Flight) -> Tensor:
    """What an exchange brings: local tensor [sum(receive), ...], blocks in rank order. Once for each `launch`.

    Backward: starts the reverse all-to-all of the gradient.
    """
    link, flight.link = flight.link, None
    assert link is not None, "landed twice"
    return _Land.apply(link, flight.phases)


@_uncompiled
def launch_data(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Flight:
    """`launch` of what has no gradient; `wait` of the flight has its result, once.

    Collective: one all-to-all over `group`.
    """
    phases = _Phases(group, send, receive)
    phases.start(x)
    return Flight(phases)


def is_backward() -> bool:
    """Whether a backward runs, as around what activation checkpointing computes again."""
    return torch._C._current_graph_task_id() != -1


def give_way() -> None:
    """Let the other sequence in flight run, while what this one waits for is under way."""
    if (lane := current().lane) is not None:
        lane.give_way()


@_uncompiled
def all_to_all(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Exchange blocks of leading rows between the ranks of `group`: `launch` and `land`.

    With two sequences in flight the other one runs in between.

    Args:
        x: local tensor [sum(send), ...]; block r, of `send[r]` rows, goes to rank r.
        receive: rows that arrive from each rank; `receive[r]` here equals `send[me]` on rank r.

    Returns:
        Local tensor [sum(receive), ...], blocks in rank order.

    Collective: one all-to-all over `group`; its backward is the reverse all-to-all.
    """
    return all_to_all_of_each((x,), group, ((send, receive),))[0]


@_uncompiled
def all_to_all_of_each(
    tensors: Sequence[Tensor], group: dist.ProcessGroup, sizes: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Tensor]:
    """`all_to_all` of several tensors, whose exchanges are under way at once.

    Args:
        sizes: what each one sends to the ranks and receives from them.

    Collectives: one all-to-all each over `group`; the backward has the reverse ones.
    """
    flights = [launch(x, group, *size) for x, size in zip(tensors, sizes, strict=True)]
    give_way()
    return [land(flight) for flight in flights]


def exchange(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`all_to_all` of what has no gradient, with nothing in between."""
    transport = running_transport()
    return transport.wait(transport.start(x, group, send, receive))
