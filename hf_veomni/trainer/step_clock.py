"""Where the time of a step goes on one rank: marks between its phases, and what waits for exchanges within them.

    get_batch_samples | training_step             | clip, optimizer.step | log, save, evaluate
    data              | forward      | backward   | optimizer            | other
                          exchange: this stream stands still until an all-to-all has arrived
                          work: inside of the layers, exchanges and gathers of parameters not counted

On CUDA marks are events of the current stream, which nobody waits for before `take`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_veomni.comm.all_to_all import running_transport
from hf_veomni.context import within

PHASES = ("data", "forward", "backward", "optimizer", "other")
_INSIDE = "exchange inside of layers"


class StepClock:
    """Seconds by phase since the last `take`, and of "exchange" and "work" within them."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda, self._clock = device.type == "cuda", clock
        self._marks: list[tuple[str, Any]] = []
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[Any] = []

    def _now(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, phase: str) -> None:
        """From now on it is `phase`."""
        self._marks.append((phase, self._now()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what is inside as `name`, too."""
        begin = self._now()
        try:
            yield
        finally:
            self._spans.append((name, begin, self._now()))
            if self._open:
                self._spans.append((_INSIDE, *self._spans[-1][1:]))

    def enter(self, module: nn.Module, args: object) -> None:
        self._open.append(self._now())

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self._spans.append(("work", self._open.pop(), self._now()))

    def watch(self, layers: Sequence[nn.Module]) -> list[Any]:
        """Hooks that time the layers' forward, behind those of FSDP2 that gather parameters."""
        hooks = [layer.register_forward_pre_hook(self.enter) for layer in layers]
        return hooks + [layer.register_forward_hook(self.leave, prepend=True) for layer in layers]

    @contextmanager
    def watching_exchanges(self) -> Iterator[None]:
        """Time the exchanges that begin within the block."""
        with within(transport=_TimedTransport(self)):
            yield

    def take(self) -> dict[str, float]:
        """The sums, and a new beginning. On CUDA it waits for the device."""
        self.mark("other")
        if self._cuda:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {name: 0.0 for name in (*PHASES, "exchange", "work", _INSIDE)}
        for (phase, begin), (_, end) in zip(self._marks[:-1], self._marks[1:], strict=True):
            found[phase] += self._between(begin, end)
        for name, begin, end in self._spans:
            found[name] += self._between(begin, end)
        self._marks, self._spans = self._marks[-1:], []
        found["work"] -= found.pop(_INSIDE)
        return found

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin


class _TimedTransport:
    """The transport that would run, with a clock around its waits."""

    def __init__(self, clock: StepClock) -> None:
        self._clock, self._inner = clock, running_transport()

    def start(self, x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Any:
        return self._inner.start(x, group, send, receive)

    def wait(self, ticket: object) -> Tensor:
        with self._clock.span("exchange"):
            return self._inner.wait(ticket)
