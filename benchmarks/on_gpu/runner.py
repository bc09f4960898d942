"""Start the parts, each in a process of its own with a time limit, and keep what they report.

`on_gpu.json` is written anew after each row, and the log after each line, so that nothing is lost when the run is cut
off. A case that hangs is killed with its stacks in the log; one that crashes or loses the device costs itself alone,
since its part goes on in a new process.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.on_gpu import Spec
from benchmarks.on_gpu.part import DEVICE_LOST, FAILED, PATIENCE, Settings, serve, start_context

START_SECONDS = 150.0  # until a process has imported all it needs; a cold disk and a busy machine are slow
POLL_SECONDS = 0.2
RESERVE_SECONDS = 4.0  # of the budget, for killing what is left and for the table


class Log:
    """One file for the output of all parts, each line with the name of its part."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def write(self, name: str, text: str) -> None:
        for line in text.splitlines():
            self._file.write(f"{name:8}| {line}\n")
        self._file.flush()


class Job:
    """One part: its process, or several in turn, and its record."""

    def __init__(self, name: str, spec: Spec, settings: Settings, folder: Path, log: Log, context: Any) -> None:
        self.name, self.spec, self.settings = name, spec, settings
        self.record: dict[str, Any] = {"status": "waiting", "seconds": 0.0, "rows": []}
        self.environment: dict[str, Any] | None = None
        self._output, self._log, self._context = folder / name, log, context
        self._read, self._begun = 0, []
        self._process: Any = None
        self._pipe: Connection | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, end: float) -> None:
        """Begin, or go on behind the last case that was begun; `end` is when time is up."""
        ours, theirs = self._context.Pipe(duplex=False)
        now = time.monotonic()
        arguments = (self.name, self.spec.module, self.settings, end - now, self._begun, theirs, str(self._output))
        self._process = self._context.Process(target=serve, args=arguments, name=self.name)
        self._process.start()
        theirs.close()
        self._pipe, self._started, self._end = ours, now, end
        self._case, self._case_end = "", min(end, now + START_SECONDS * PATIENCE[self.settings.device])
        self.record["status"] = "running"

    def poll(self) -> list[dict[str, Any]]:
        """The rows that came since, and whether the process is still to be waited for: see `running`."""
        assert self._pipe is not None
        rows: list[dict[str, Any]] = []
        alive = self._process.is_alive()
        try:
            while self._pipe.poll():
                rows += self._take(self._pipe.recv())
        except (EOFError, OSError):
            pass
        self._copy_output()
        if not alive:
            rows += self._ended(self._process.exitcode)
        elif time.monotonic() > self._case_end:
            rows += self._stop()
        self.record["rows"] += rows
        return rows

    def waited_for(self) -> list[Any]:
        return [self._pipe, self._process.sentinel]

    def _take(self, message: tuple) -> list[dict[str, Any]]:
        kind, *values = message
        if kind == "environment":
            self.environment, self._case_end = values[0], self._end
        elif kind == "begin":
            self._case, self._case_end = values[0], time.monotonic() + values[1]
            self._begun.append(self._case)
        return [values[0]] if kind == "row" else []

    def _ended(self, status: int) -> list[dict[str, Any]]:
        rows = []
        crashed = status < 0 or status not in (0, 1, DEVICE_LOST)
        if crashed:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            rows = [self._row(f"crashed with {how}: the log has the stacks")]
        self._close("done" if status == 0 else "failed")
        if (crashed or status == DEVICE_LOST) and self._case:
            self._again()
        return rows

    def _stop(self) -> list[dict[str, Any]]:
        took = time.monotonic() - self._started
        what = f"stopped after {took:.0f} s" if self._case else f"had not started after {took:.0f} s"
        row = self._row(f"{what}: the log has the stacks")
        self.kill()
        if self._case:
            self._again()
        return [row]

    def _again(self) -> None:
        """Go on with the next case, if there is time for it."""
        if self._end - time.monotonic() > RESERVE_SECONDS:
            self.start(self._end)

    def kill(self) -> None:
        """End the process and all that it started, with their stacks in the log."""
        if not self.running:
            return
        self._signal(signal.SIGUSR1)
        self._process.join(1.0)
        self._signal(signal.SIGKILL)
        self._process.join(5.0)
        self._copy_output()
        self._close("stopped")

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # gone, or not yet a group of its own
        if number == signal.SIGKILL:
            self._process.kill()

    def _close(self, status: str) -> None:
        self._signal(signal.SIGKILL)  # what it may have left behind
        self._process.join(5.0)
        self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self._started, 1)
        self.record["status"] = status
        assert self._pipe is not None
        self._pipe.close()
        self._process = None

    def _row(self, summary: str) -> dict[str, Any]:
        return {"case": self._case, "status": FAILED, "summary": summary}

    def _copy_output(self) -> None:
        """New whole lines of the process go into the log."""
        if self._output.exists():
            with self._output.open("rb") as file:
                file.seek(self._read)
                text = file.read()
            text = text if not self.running or not self._process.is_alive() else text[: text.rfind(b"\n") + 1]
            self._read += len(text)
            self._log.write(self.name, text.decode(errors="replace"))


class Runner:
    """The complete run.

    Args:
        parts: in their order.
        output: folder of `on_gpu.json` and `on_gpu.log`.
        budget: seconds for everything; parts that measure nothing share theirs.
        jobs: how many parts may run at once, of those that need not be alone.
        show: is called with the name of a part and each of its rows.
    """

    def __init__(
        self,
        parts: Mapping[str, Spec],
        settings: Settings,
        output: Path,
        scratch: Path,
        *,
        budget: float,
        jobs: int,
        header: Mapping[str, Any],
        show: Callable[[str, Mapping[str, Any]], Any],
    ) -> None:
        context = start_context(settings.device)
        log = Log(output / "on_gpu.log")
        self._jobs = [Job(name, spec, settings, scratch, log, context) for name, spec in parts.items()]
        self._path, self._at_once, self._show, self._header = output / "on_gpu.json", jobs, show, dict(header)
        self._end = time.monotonic() + budget - RESERVE_SECONDS
        self._cut = False
        self._scale = budget / total_seconds(parts, jobs)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        return {job.name: job.record for job in self._jobs}

    def run(self) -> dict[str, dict[str, Any]]:
        """What each part reported. On SIGTERM or SIGINT all ends at once, with what there is."""
        previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        waiting = list(self._jobs)
        try:
            while not self._cut and (waiting or self._running()):
                waiting = self._start(waiting)
                running = self._running()
                wait([source for job in running for source in job.waited_for()], POLL_SECONDS)
                for job in running:
                    for row in job.poll():
                        self._show(job.name, row)
                self.write()
        finally:
            for job in self._jobs:
                job.kill()
            self.write()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.records

    def _running(self) -> list[Job]:
        return [job for job in self._jobs if job.running]

    def _start(self, waiting: list[Job]) -> list[Job]:
        """Start what may run now; returns what has to wait longer."""
        while waiting and (now := time.monotonic()) < self._end:
            running, job = self._running(), waiting[0]
            if running and (job.spec.alone or running[0].spec.alone or len(running) >= self._at_once):
                return waiting
            rest = {other.name: other.spec for other in (*running, *waiting)}
            job.start(min(self._end, now + share(job.spec, rest, self._at_once, self._end - now, self._scale)))
            waiting = waiting[1:]
        for job in waiting:
            job.record["status"] = "no time left"
        return []

    def _interrupt(self, *_: Any) -> None:
        self._cut = True

    def write(self) -> None:
        """The json, in one step."""
        found = next((job.environment for job in self._jobs if job.environment is not None), {})
        content = {"benchmark": "on_gpu", **found, **self._header, "parts": self.records}
        scratch = self._path.with_suffix(".part")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(self._path)


def share(spec: Spec, rest: Mapping[str, Spec], jobs: int, left: float, scale: float) -> float:
    """Seconds for a part that starts now: what earlier parts did not need of theirs goes to all that is not done.

    Args:
        rest: the parts that are not done, this one among them.
        left: seconds of the budget.
        scale: of the complete run, which no part gets less than.
    """
    return spec.seconds * max(scale, left / total_seconds(rest, jobs))


def total_seconds(parts: Mapping[str, Spec], jobs: int) -> float:
    """What the parts take by their shares, those side by side at once."""
    together = [spec.seconds for spec in parts.values() if not spec.alone]
    alone = sum(spec.seconds for spec in parts.values() if spec.alone)
    return alone + (max(max(together), sum(together) / jobs) if together else 0.0)
