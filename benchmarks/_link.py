"""A link with a clock of its own: one process stands for one of N ranks, and a loaded machine changes nothing.

    clock      seconds of this thread's CPU time + what was waited for the link - what moving the bytes took of it
    transfer   begins when its exchange is called and the transfers before it are through; takes
               bytes / bandwidth + latency; bytes that leave this rank or come, the more of both
    wait       sets the clock to the end of the transfer, if that is still ahead: the exposed part

    compute    |== a ==|== b ==|~~~~~~|== c ==|         ~ waited: exposed
    link               |--------------|

`linked` makes it the process group of this process: torch's collectives, FSDP2's among them, find N ranks whose data
is a copy of this rank's. So block `rank` of what this rank sends comes back from everyone, counts agree with what
arrives, and the exchange really moves as many bytes as on N ranks. Values are those of N equal ranks: right for
comparing schedules with each other, and of no use as a model's. Where a rank sends another number of rows to each (a
skewed router), what comes back from the others is not known here: `equal=False` has zeros of the right sizes for it.

All-to-alls take the link. Gathers, reductions and broadcasts take no time: FSDP prefetches them, and they would hide
what the exchanges of a layer cost. Neither do messages from rank to rank, which `_pipeline.py` has on a clock for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Work

BACKEND = "link"


class Link:
    """A serial link, in seconds of a clock that runs with this thread's CPU time.

    Attributes:
        bandwidth: bytes a second in each direction.
        latency: seconds of every transfer beside.
        busy: seconds that transfers took since `reset`.
        waited: seconds of them in which nothing was computed.
        transfers: (begin, end, bytes) of each.
        gathered: bytes of gathers and reductions that leave this rank or come, which take no time.
        waits: (begin, end) of each wait that found its transfer unfinished.
    """

    def __init__(
        self,
        bandwidth: float = float("inf"),
        latency: float = 0.0,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        if not bandwidth > 0 or latency < 0:
            raise ValueError(f"`bandwidth` ({bandwidth}) must be above 0, `latency` ({latency}) not below.")
        self.bandwidth, self.latency, self._clock = bandwidth, latency, clock
        self.reset()

    def reset(self) -> None:
        """Set the clock to 0 and forget all transfers."""
        self._begin, self._free, self._moving = self._clock(), 0.0, 0.0
        self.busy = self.waited = 0.0
        self.gathered = 0
        self.transfers: list[tuple[float, float, int]] = []
        self.waits: list[tuple[float, float]] = []

    def now(self) -> float:
        """Seconds since `reset`: computed and waited."""
        return self.compute + self.waited

    @property
    def compute(self) -> float:
        """Seconds of this thread's CPU time since `reset`, without those that moved bytes."""
        return self._clock() - self._begin - self._moving

    def start(self, num_bytes: int) -> float:
        """Begin a transfer. Returns when it ends; compute goes on meanwhile."""
        seconds = num_bytes / self.bandwidth + self.latency
        begin = max(self.now(), self._free)
        self._free = begin + seconds
        self.busy += seconds
        self.transfers.append((begin, self._free, num_bytes))
        return self._free

    def wait(self, until: float) -> None:
        """Wait for a transfer that ends at `until`."""
        now = self.now()
        if until > now:
            self.waits.append((now, until))
            self.waited += until - now

    @contextmanager
    def moving(self) -> Iterator[None]:
        """What this block takes of the thread is the link's work, done by its own hardware on a real device."""
        begin = self._clock()
        try:
            yield
        finally:
            self._moving += self._clock() - begin


class _Transfer(Work):
    def __init__(self, link: Link, until: float | None, out: Any) -> None:
        super().__init__()
        self._link, self._until = link, until
        self._future: Any = torch.futures.Future()
        self._future.set_result(out)

    def wait(self, timeout: Any = None) -> bool:
        if self._until is not None:
            self._link.wait(self._until)
        return True

    def is_completed(self) -> bool:
        return self._until is None or self._until <= self._link.now()

    def get_future(self) -> Any:
        return self._future


class LinkGroup(dist.ProcessGroup):
    """N ranks of which this process is one and the others hold the same."""

    def __init__(self, rank: int, size: int, link: Link, equal: bool = True) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks `size`
        self._rank, self._size, self._link, self._equal = rank, size, link, equal
        self._names: dict[str, str] = {}

    def getBackendName(self) -> str:
        return BACKEND

    def setGroupName(self, name: str) -> None:
        self._names["name"] = name

    def getGroupName(self) -> str:
        return self._names.get("name", "")

    def setGroupDesc(self, name: str) -> None:
        self._names["desc"] = name

    def getGroupDesc(self) -> str:
        return self._names.get("desc", "")

    def _done(self, out: Any, until: float | None = None) -> _Transfer:
        return _Transfer(self._link, until, out)

    def alltoall_base(
        self, out: Tensor, sent: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> _Transfer:
        rows = list(send) or [len(sent) // self._size] * self._size
        arriving = list(receive) or [len(out) // self._size] * self._size
        copies = self._equal or not sent.is_floating_point()
        if any(count != rows[self._rank] for count in (arriving if copies else [arriving[self._rank]])):
            raise ValueError(
                f"Rank {self._rank} sends itself {rows[self._rank]} rows and expects {arriving} of ranks that send "
                "the same: a size that does not come from the counts exchanged."
            )
        leaving, coming = (sum(counts) - counts[self._rank] for counts in (rows, arriving))
        until = self._link.start(max(leaving, coming) * out.element_size() * out[:1].numel())
        with self._link.moving():
            first = sum(rows[: self._rank])
            block = sent.detach()[first : first + rows[self._rank]]
            if copies:
                out.detach().view(self._size, *block.shape).copy_(block)
            else:
                mine = sum(arriving[: self._rank])
                out.detach().zero_()[mine : mine + len(block)] = block
        return self._done([out], until)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> _Transfer:
        self._link.gathered += output.nbytes - input.nbytes
        with self._link.moving():
            output.view(self._size, *input.shape).copy_(input.clone())  # FSDP's lies in `output`
        return self._done([output])

    def reduce_scatter_single(self, out: Tensor, given: Tensor, opts: Any) -> _Transfer:
        self._link.gathered += given.nbytes - out.nbytes
        with self._link.moving():
            out.copy_(given.view(self._size, *out.shape)[self._rank])
            if opts.reduceOp != dist.ReduceOp.AVG:
                out.mul_(self._size)
        return self._done([out])

    def allgather(self, outs: list[list[Tensor]], shards: list[Tensor], opts: Any = None) -> _Transfer:
        for row, shard in zip(outs, shards, strict=True):
            for out in row:
                out.copy_(shard)
        return self._done(outs)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> _Transfer:
        if opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(self._size)
        return self._done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Transfer:
        return self._done(tensors)

    def send(self, tensors: list[Tensor], place: int, tag: int = 0) -> _Transfer:
        return self._done(tensors)

    def recv(self, tensors: list[Tensor], place: int, tag: int = 0) -> _Transfer:
        """What another rank would have sent is not known here: floats at random, and integers of 0."""
        with self._link.moving(), torch.no_grad():
            for tensor in tensors:
                tensor.normal_() if tensor.is_floating_point() else tensor.zero_()
        return self._done(tensors)

    def barrier(self, opts: Any = None) -> _Transfer:
        return self._done([])

    # Names of torch before 2.13.
    _allgather_base: Any = all_gather_single
    _reduce_scatter_base: Any = reduce_scatter_single


@contextmanager
def linked(link: Link, size: int, rank: int = 0, equal: bool = True) -> Iterator[None]:
    """Within this context the process is rank `rank` of `size` ranks behind `link`: the default process group.

    Args:
        equal: the others hold the same as this rank; else zeros, in exchanges of floats.
    """

    def make(store: Any, group_rank: int, group_size: int, timeout: Any) -> LinkGroup:
        return LinkGroup(group_rank, group_size, link, equal)

    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _make, devices=["cpu"])
    _makers.append(make)
    known: dict[str, Any] = PartialState._shared_state  # of accelerate, which asks once in a process
    before = dict(known)
    known.clear()
    try:
        dist.init_process_group(BACKEND, rank=rank, world_size=size, store=HashStore())
        yield
    finally:
        _makers.pop()
        known.clear()
        known.update(before)
        if dist.is_initialized():
            dist.destroy_process_group()


_makers: list[Callable[..., LinkGroup]] = []


def _make(*args: Any) -> LinkGroup:
    """A backend is registered once in a process; links come and go."""
    return _makers[-1](*args)
