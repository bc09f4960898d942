"""What a part of the run gets: its settings, a guard around each of its cases, and the way of its rows to the file."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

OK, FAILED, SKIPPED, NOTE = "ok", "FAILED", "skipped", "-"
DEVICE_LOST = 77  # exit status: CUDA answers no call of this process any more, but would answer a new one
CASE_SECONDS = 60.0
PATIENCE = {"cuda": 1.0, "cpu": 4.0}  # limits of cases are for a GPU machine; a CPU has other work, too


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    device: str
    small: bool = False


class Part:
    """One part of the run, in its own process.

    A case reports one row or more. It is guarded: an error, an exhausted memory or a crash is a row too, and the next
    case goes on, if need be in a new process.
    """

    def __init__(
        self, name: str, settings: Settings, seconds: float, done: Collection[str], send: Callable[[tuple], Any]
    ) -> None:
        self.name, self.settings = name, settings
        self.device, self.small = settings.device, settings.small
        self._end, self._done, self._send, self._case = time.monotonic() + seconds, set(done), send, ""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until this part is stopped."""
        return self._end - time.monotonic()

    def row(self, status: str, summary: str, **values: Any) -> None:
        """Report one row of the running case.

        Args:
            status: OK or FAILED where something was checked, SKIPPED, or NOTE.
            summary: what the table says.
            values: what the json says besides.
        """
        self._send(("row", {"case": self._case, "status": status, "summary": summary, **values}))

    def check(self, passed: bool, summary: str, **values: Any) -> None:
        """Report a row that was checked."""
        self.row(OK if passed else FAILED, summary, **values)

    def case(self, name: str, function: Callable[..., Any], *args: Any, seconds: float = CASE_SECONDS) -> None:
        """Call `function(*args)`, which reports rows.

        Args:
            seconds: it is stopped after so long (on a CPU, a multiple). It is not begun with less than a third of it
                left.
        """
        if name in self._done:
            return
        self._case = name
        if self.left() < seconds / 3:
            self.row(SKIPPED, f"{max(0.0, self.left()):.0f} s of this part are left, it may take {seconds:.0f}")
            return
        self._send(("begin", name, min(seconds * PATIENCE[self.device], self.left())))
        try:
            function(*args)
        except Exception as error:
            traceback.print_exc()
            self.row(FAILED, f"{type(error).__name__}: {str(error).strip()[:300]}")
            if self.cuda and _device_lost(error):
                leave(DEVICE_LOST)
            # The traceback holds tensors.
            error.__traceback__ = None
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()


def _device_lost(error: Exception) -> bool:
    """Whether it is an error of the CUDA context, which all later calls would answer too."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def start_context(device: str) -> Any:
    """How processes are started: CUDA does not survive a fork; without it a fork saves the imports."""
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    if device == "cpu":
        context.set_forkserver_preload(["benchmarks.on_gpu.preload"])
    return context


def leave(status: int) -> None:
    """End this process at once: no destructor of a process group or of a CUDA context gets to hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def show_stacks_when_asked() -> None:
    """On SIGUSR1, and on a crash, write the stacks of all threads to what is stderr now, whoever captures it later."""
    log = os.dup(2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)


def serve(
    name: str, module: str, settings: Settings, seconds: float, done: Collection[str], pipe: Connection, log: str
) -> None:
    """The process of one part: output goes to `log`, rows into `pipe`."""
    os.setsid()  # so that the runner can end it with all that it starts
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    show_stacks_when_asked()
    part = Part(name, settings, seconds, done, pipe.send)
    status = 0
    try:
        pipe.send(("environment", _prepare(settings)))
        importlib.import_module(module).run(part)
    except BaseException as error:
        traceback.print_exc()
        part.row(FAILED, f"{type(error).__name__}: {str(error).strip()[:300]}")
        status = 1
    leave(status)


def compute_exactly() -> None:
    """No TF32 in matmuls and, where it is torch's default, in convolutions."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _prepare(settings: Settings) -> dict[str, Any]:
    """Precision and threads of this process; returns what stands beside all rows."""
    import torch
    import transformers

    from benchmarks._record import environment

    compute_exactly()
    if settings.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 4) // 4))
        if not torch.cuda.is_available():
            raise ValueError("`device` (cuda) is not here: use --device cpu, which runs every part, small.")
    transformers.logging.set_verbosity_error()
    return environment()
