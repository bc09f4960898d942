"""A scheduler's signal: a checkpoint at the next step boundary and then the end, on all ranks together.

    scheduler    SIGTERM or SIGUSR1 to any rank, or to all of them
    that rank    notes it
    all ranks    hear of it before the next step (`facts.SIGNAL`), train that step, save
    all ranks    raise `Preempted`, by which the process exits with `PREEMPTED`

Trainer's own `JITCheckpointCallback` decides on each rank by itself, three seconds after the signal: ranks that
save at different steps, or not at all, deadlock.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: what failed for now, and works when it is started again


class Preempted(SystemExit):
    """Training has ended early because of a signal, and can go on from a checkpoint.

    It ends the process with the exit code 75 unless the script catches it; an `except Exception` does not.

    Attributes:
        checkpoint: from which training goes on.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(PREEMPTED)
        self.checkpoint = checkpoint


class Signals:
    """Within `with`, the signals of a scheduler are noted and do nothing else, however many come.

    Attributes:
        received: number of the first one; 0 for none.

    Raises:
        ValueError: this is not the main thread, which alone may listen to signals.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "`enable_jit_checkpoint` (True) listens to signals, which Python allows in the main thread alone: "
                "call `train` there, or leave it out."
            )
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = self.received or number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def shield_workers(loader: Any) -> None:
    """Let the worker processes of a loader outlive a signal that a scheduler sends to all processes of a job: a batch
    of the last step comes from them. What the loader itself sends still ends them."""
    starts = getattr(loader, "base_dataloader", loader)  # accelerate's loader wraps the one that has the workers
    if getattr(starts, "num_workers", 0) > 0:
        starts.worker_init_fn = partial(_shield, starts.worker_init_fn)


def _shield(init: Callable[[int], None] | None, worker: int) -> None:
    """In a worker, before its first batch. A handler would not do: only a thread that waits learns who has sent it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=_end_with_loader, args=(os.getppid(),), daemon=True).start()
    if init is not None:
        init(worker)


def _end_with_loader(parent: int) -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
        pass
    os._exit(0)


def say(asked: Mapping[int, int]) -> str:
    """Who got which signal, in words."""
    return ", ".join(f"{signal.Signals(number).name} on rank {rank}" for rank, number in sorted(asked.items()))
