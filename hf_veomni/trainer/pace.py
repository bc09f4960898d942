"""Which rank the others wait for: each tells before a step how long it has read, and waited, and nothing is measured
beside that.

    rank 0   train | read |---- waits in the exchange ----| train
    rank 1   train | read ................................| train      rank 1 is late

A rank whose device is slow within a step is not seen: the others wait for it in the step's own collectives.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hf_veomni.trainer.facts import READING, WAITING

_SHARE = 0.1  # of a step that the others must wait for a rank before it is named
_LEAST = 0.02  # seconds a step
_STEPS = 10  # at least, so that nobody is named for a hiccup
_FIRST = 2  # exchanges that tell of the start: ranks begin one after the other


class Pace:
    """The times of the ranks between two logs.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._named: set[int] = set()
        self._exchanges = 0
        self._restart()

    def _restart(self) -> None:
        self._begin, self._steps = self._clock(), 0
        self._sums: Tensor | None = None

    def add(self, facts: Tensor) -> None:
        """Count the facts of a step."""
        self._exchanges += 1
        if self._exchanges <= _FIRST:
            self._restart()
            return
        times = facts[:, [READING, WAITING]].double() / 1e6
        self._sums = times if self._sums is None else self._sums + times
        self._steps += 1

    def take(self) -> str | None:
        """Name the rank that the others have waited for, each once. None: there was none, or too little is known."""
        if self._steps < _STEPS:
            return None
        sums, steps, seconds = self._sums, self._steps, self._clock() - self._begin
        self._restart()
        if sums is None or len(sums) < 2 or seconds <= 0:
            return None
        reading, waiting = sums.unbind(1)
        order = torch.argsort(waiting)
        slow = int(order[0])
        late = float(waiting[order[1]] - waiting[slow])
        if late < _SHARE * seconds or late < _LEAST * steps or slow in self._named:
            return None
        self._named.add(slow)
        others = torch.cat([reading[:slow], reading[slow + 1 :]]).median()
        return (
            f"The other ranks waited {late / steps:.2g} s a step for rank {slow}, {late / seconds:.0%} of a step's "
            f"{seconds / steps:.2g} s. It read its batches for {reading[slow] / steps:.2g} s a step, the others for "
            f"{others / steps:.2g} s: if that is it, raise `dataloader_num_workers` or look at its disk; else look "
            "for what else that machine does between the steps."
        )
