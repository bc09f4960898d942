"""No silent hang: a thread on each rank tells what its main thread is at, and ends the rank when another one is lost.

    every rank    tells once a second: how far it is, where its main thread stands, since when
    rank 0        compares, and posts what is wrong: a rank that failed, that nobody hears of, or that does not move
    every rank    reads that; if its main thread has not noticed by itself, it logs the message and ends the process

A collective that waits for a lost rank cannot be interrupted from Python, so the end is an exit with the code
`STALLED`. torch's own limit for a collective (`ddp_timeout`, half an hour) names neither the rank nor the place.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

from hf_veomni.checkpoint.plain import gather_full_state
from hf_veomni.checkpoint.stages import join_stages
from hf_veomni.trainer import in_use
from hf_veomni.trainer.signals import Preempted
from hf_veomni.trainer.store import Board

if TYPE_CHECKING:
    from hf_veomni.trainer.guarding import Progress

logger = logging.getLogger(__name__)

STALLED = 76  # EX_PROTOCOL of sysexits.h: what another rank did made going on impossible
LOST = 30.0  # seconds after which a rank that says nothing counts as lost
_LOST_BROKEN = 5.0  # the same once an exchange broke off, as it does where a process has ended
GRACE = 10.0  # seconds that a main thread gets to notice an error of another rank by itself
_PERIOD = 1.0
_TORCH, _OWN = os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__))
_LIBRARIES = (os.path.dirname(os.__file__), _TORCH, _OWN)
_TRAINER = inspect.getsourcefile(Trainer)
# Own files whose lines take long where a disk does, or the process that writes beside training; but for two functions,
# which copy from the device what others have sent.
_DISK = (os.path.join(_OWN, "checkpoint", ""), in_use.__file__)
_GATHERS = frozenset(function.__code__ for function in (gather_full_state, join_stages))
# Files that are on the stack of some thread only while a graph is compiled: in a later step too, for another shape.
_COMPILERS = tuple(
    os.path.join(_TORCH, *path)
    for path in (("_dynamo", "convert_frame.py"), ("_inductor", "compile_fx.py"), ("_inductor", "async_compile.py"))
)
_CALLBACKS = inspect.getsourcefile(CallbackHandler)
# Of errors without a class of their own: those of gloo name its source file, those of a store in a file say just this.
_EXCHANGE = re.compile(r"\[.*\bgloo[/\\].*\]|\bNCCL\b|^Timeout waiting for key: |^Wait timeout$")


class RankError(RuntimeError):
    """Another rank failed, was lost or stands still, so that this one cannot go on."""


@dataclass(frozen=True)
class Report:
    """What a rank tells.

    Attributes:
        beat: how often it has told something.
        count, place, stack, waits: how far it is, and where its main thread stands.
        age, limit: seconds that it has been there, and that it may be.
        waited: seconds that it has been seen waiting at one line there.
        patient: whether the limit is how long others may wait for it, and it may be there for ever if none does.
        ended: empty, "done", or the error by which it left.
        broken: whether an exchange with another rank broke off.
    """

    beat: int
    count: int
    place: str
    stack: str
    waits: bool
    age: float
    limit: float
    waited: float = 0.0
    patient: bool = False
    ended: str = ""
    broken: bool = False


def is_of_exchange(error: BaseException) -> bool:
    """Whether torch's collectives or its store raised it. A user's own error may time out or be reset, too."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _EXCHANGE.search(str(error)) is not None


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def judge(reports: Sequence[Report | None], silences: Sequence[float], broken: bool = False) -> tuple[str, str] | None:
    """What is wrong, or None.

    Args:
        reports: of each rank; None where there was none yet.
        silences: seconds since each has told something new.
        broken: whether an exchange broke off, as far as this rank knows.

    Returns:
        "failed", "lost" or "stalled", and the message.
    """
    ended = ["" if report is None else report.ended for report in reports]
    for rank, error in enumerate(ended):
        if error not in ("", "done"):
            return "failed", f"Rank {rank} failed: {error}"
    running = [rank for rank, error in enumerate(ended) if not error]
    broken = broken or any(report is not None and report.broken for report in reports)
    limit = _LOST_BROKEN if broken else LOST
    known = {rank: report for rank in running if (report := reports[rank]) is not None}
    expected = running if broken else list(known)  # who has not spoken yet may still prepare its data
    if any(silences[rank] > limit for rank in expected):
        # With all those that fell silent in the same moment, as where a link is cut.
        lost = [rank for rank in expected if silences[rank] > limit - 2 * _PERIOD]
        places = "; ".join(known[rank].place if rank in known else "starting" for rank in lost)
        return "lost", (
            f"Nothing has been heard of {name_ranks(lost)} for {max(silences[rank] for rank in lost):.0f} s; before: "
            f"{places}. The process was killed or stopped, or its machine is gone."
        )
    if len(known) < len(running) or not known:
        return None
    least = min(report.count for report in known.values())
    behind = {rank: report for rank, report in known.items() if report.count == least}
    waited = max(report.waited for report in known.values())
    ages = {rank: min(r.age, waited) if r.patient else r.age for rank, r in behind.items()}
    stuck = {rank: report for rank, report in behind.items() if ages[rank] > report.limit}
    moving = any(not report.waits and rank not in stuck for rank, report in behind.items())
    if moving or not stuck:
        return None
    # Whoever waits in a collective waits for somebody; if all do, they are not in the same one.
    culprits = {rank: report for rank, report in stuck.items() if not report.waits} or stuck
    where = "; ".join(f"rank {rank} for {r.age:.0f} s in {r.place} ({r.stack})" for rank, r in culprits.items())
    waiting = [rank for rank in running if rank not in culprits]
    rest = f" {name_ranks(waiting).capitalize()} wait{'s' * (len(waiting) == 1)}." if waiting else ""
    if any(report.patient for report in culprits.values()):
        way_out = "If this may take so long, set a higher `wait_timeout`."
    else:
        way_out = "Longer parts of a step need a higher `stall_timeout`."
    return "stalled", f"No progress: {where}.{rest} {way_out}"


def describe_stack(frame: Any) -> tuple[str, bool]:
    """Where a thread stands: its innermost line and the innermost that is no library's; and whether it waits for other
    ranks or the device, as far as that shows."""
    lines = traceback.extract_stack(frame)
    inner = lines[-1]
    collective = any(f"{os.sep}distributed{os.sep}" in line.filename for line in lines[-5:])
    waits = inner.filename.startswith(_TORCH) and (collective or inner.name == "_engine_run_backward")
    # A line of these that takes so long reads a value from the device.
    own = inner.filename.startswith(_OWN) and (not inner.filename.startswith(_DISK) or frame.f_code in _GATHERS)
    waits = waits or own or inner.filename == _TRAINER
    theirs = [line for line in lines if not line.filename.startswith(_LIBRARIES) and "<" not in line.filename]
    shown = [inner] if not theirs or theirs[-1] is inner else [inner, theirs[-1]]
    return ", from ".join(f"{line.filename}:{line.lineno} in {line.name}" for line in shown), waits


def _files(frame: Any) -> set[str]:
    """Of a thread's stack."""
    found: set[str] = set()
    while frame is not None:
        found.add(frame.f_code.co_filename)
        frame = frame.f_back
    return found


def is_debugged(frame: Any) -> bool:
    return any(os.path.basename(file) in ("bdb.py", "pdb.py") for file in _files(frame))


def takes_its_time(main: Any, others: Iterable[Any]) -> bool:
    """Whether a step is interrupted by what may take long: a callback, or a compilation, whose backward is compiled in
    another thread."""
    return _CALLBACKS in _files(main) or any(not _files(frame).isdisjoint(_COMPILERS) for frame in (main, *others))


class Watchdog:
    """See the module. One a rank and a `train`.

    Args:
        progress: what the main thread is at; it keeps that up to date.
        limit: seconds that a rank may be at a limited place.
        patience: seconds that others may wait for it at any other.
    """

    def __init__(self, progress: Progress, limit: float, patience: float) -> None:
        self.progress = progress
        self.verdict: tuple[str, str] | None = None
        self._limit, self._patience = limit, max(patience, limit)
        self._board = Board("watchdog", clone=True)
        self._main, self._stopped = threading.get_ident(), threading.Event()
        self._lock = threading.Lock()
        self._ended, self._broken, self._beats = "", False, 0
        self._waits_at, self._waits_since = (0, ""), 0.0  # place and stack
        world, now = self._board.world, time.monotonic()
        self._reports: list[Report | None] = [None] * world
        self._heard, self._talked = [now] * world, now
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, error: BaseException | None) -> None:
        """The main thread has left training, by an error or without. Tells the others."""
        calm = error is None or isinstance(error, Preempted)
        self._ended = "done" if calm else f"{type(error).__name__}: {error}"[:2000]
        self._stopped.set()
        # Beside the main thread, which a store that does not answer, as where a link is cut, would hold for ever.
        self._threads.append(threading.Thread(target=self._say_last, daemon=True))
        self._threads[-1].start()
        self._threads[-1].join(GRACE)
        for thread in self._threads:
            thread.join(_PERIOD)
        if not any(thread.is_alive() for thread in self._threads):
            del self._board  # with its connection, now and not at some later collection

    def _say_last(self) -> None:
        try:
            self._exchange()
        except Exception as gone:  # of any kind: the store went with another rank, which is known already
            logger.debug("The last word of this rank was not heard: %s", gone)

    def explain(self, error: BaseException) -> RankError | None:
        """If `error` says that an exchange broke, what is behind it; waits until it is known, `LOST` and a few seconds
        at most."""
        if not is_of_exchange(error):
            return None
        self._broken = True
        end = time.monotonic() + LOST + 5 * _PERIOD
        while self.verdict is None and time.monotonic() < end:
            time.sleep(0.1)
        if self.verdict is not None and self.verdict[0] == "stalled":
            self._end(self.verdict[1])  # as all ranks do, be it that another one has left before this one
        return None if self.verdict is None else RankError(self.verdict[1])

    def _report(self) -> Report:
        frames = sys._current_frames()
        try:
            return self._describe(frames.pop(self._main), frames.values())
        finally:
            # This call's own frame is among them. It would hold itself, and with it whatever the main thread has at
            # hand now, activations too, until Python looks for cycles.
            frames.clear()

    def _describe(self, main: Any, others: Collection[Any]) -> Report:
        place = self.progress
        stack, waits = describe_stack(main)
        patient = not place.limited or takes_its_time(main, others)
        limit = self._patience if patient else min(max(self._limit, place.usual), self._patience)
        now = time.monotonic()
        age = 0.0 if is_debugged(main) else now - place.since
        if not waits or self._waits_at != (place.count, stack):
            self._waits_at, self._waits_since = (place.count, stack), now
        self._beats += 1
        return Report(
            self._beats, place.count, place.place, stack, waits, age, limit, now - self._waits_since, patient,
            self._ended, self._broken,
        )  # fmt: skip

    def _exchange(self) -> None:
        """Tell what this rank is at, and read what the others tell, or rank 0 alone."""
        with self._lock:
            board, now = self._board, time.monotonic()
            board.post(str(board.rank), asdict(self._report()))
            for rank in range(board.world) if board.rank == 0 else (0,):
                told = board.read(str(rank))
                report = None if told is None else Report(**told)
                if report is not None and report != self._reports[rank]:
                    self._reports[rank], self._heard[rank] = report, now
            if board.rank == 0:
                found = judge(self._reports, [now - heard for heard in self._heard])
                if found is not None and self.verdict is None:
                    board.post("verdict", found)
                    self.verdict = found
            elif self.verdict is None and (found := board.read("verdict")) is not None:
                self.verdict = (found[0], found[1])
            self._talked = time.monotonic()

    def _talk(self) -> None:
        while not self._stopped.wait(_PERIOD):
            try:
                self._exchange()
            except Exception as error:  # of any kind: the store's own
                if not self._stopped.is_set() and self.verdict is None:
                    why = str(error).splitlines()[0]
                    self.verdict = "lost", f"The store of the process group ended with rank 0 or the launcher: {why}."
                return

    def _watch(self) -> None:
        known, last = 0.0, time.monotonic()
        while not self._stopped.wait(_PERIOD / 2):
            now = time.monotonic()
            if now - last > LOST / 2:  # this process itself was stopped, or its machine asleep
                self._forgive(now)
            last = now
            self._notice_silence(now)
            if self.verdict is None:
                continue
            known = known or now
            if self.verdict[0] == "stalled" or now - known > GRACE:
                self._end(self.verdict[1])

    def _forgive(self, now: float) -> None:
        self._talked = self._waits_since = self.progress.since = now
        self._heard = [now] * len(self._heard)

    def _notice_silence(self, now: float) -> None:
        """Of rank 0, which compares, and of the store."""
        if self.verdict is not None:
            return
        first, silence = self._reports[0], now - self._heard[0]
        if now - self._talked > LOST:
            self.verdict = "lost", f"The store of the process group has not answered for {now - self._talked:.0f} s."
        elif self._board.rank != 0 and (self._broken if first is None else not first.ended):
            # A little later than rank 0 would find others.
            if silence > (_LOST_BROKEN if self._broken else LOST) + 3 * _PERIOD:
                self.verdict = judge([first], [silence], broken=True)

    def _end(self, message: str) -> NoReturn:
        report = self._report()
        logger.error(
            "%s This rank (%d) ends with exit code %d; it was in %s (%s).",
            message, self._board.rank, STALLED, report.place, report.stack,
        )  # fmt: skip
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(STALLED)
