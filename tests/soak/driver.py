"""Starts the ranks of a run, kills them, starts them again, and compares the end with that of an undisturbed run.

A kill is one SIGKILL to a random process of the run, or to all of them at once. Some come at a random moment, some
while a checkpoint is written, after a random part of the time that takes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_veomni.checkpoint.manifest import STAGING
from hf_veomni.trainer.folders import last_complete_checkpoint
from tests.soak.training import RESULT, TIMEOUT, WORLD, Variant, run_rank

# Seconds that the other processes get to notice: in a start they wait for what one tells that was killed, and then for
# its connection.
SURVIVORS = 2 * TIMEOUT.total_seconds() + 15
ATTEMPT = 180.0  # seconds that a start may take to reach the end


@dataclass
class Tally:
    """What happened to one variant.

    Attributes:
        kills: SIGKILLs, one for each attempt that was ended by them.
        during_save: those of them that left an unfinished checkpoint behind.
        lost: starts from an earlier checkpoint than had been in its place before.
        wrong: runs whose end differs in a bit from that of the undisturbed one.
        stalled: survivors that did not end by themselves within `SURVIVORS` seconds.
        failed: starts that ended in an error without a kill.
        runs: runs that came to their end.
    """

    kills: int = 0
    during_save: int = 0
    lost: int = 0
    wrong: int = 0
    stalled: int = 0
    failed: int = 0
    runs: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Attempt:
    """The ranks of one start."""

    def __init__(self, variant: Variant, folder: Path, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.ranks.preload", "tests.soak.training", "hf_veomni.trainer"])
        self.folder, self.report = folder, folder / f"started{number}"
        self.run, self.was_saving = folder / "run", False
        self.stacks: list[str] = []  # of ranks that did not end
        arguments = (variant, folder, folder / f"rendezvous{number}", self.report)
        self.ranks: list[Any] = [
            context.Process(target=run_rank, args=(rank, *arguments), daemon=True) for rank in range(WORLD)
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def running(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    @property
    def saving(self) -> bool:
        return (self.run / STAGING).exists()

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Until the run is over, `until` is true or `seconds` have passed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until() and self.running:
            time.sleep(0.001)

    def processes(self) -> list[int]:
        """The ranks that live, and what they have started."""
        found = [rank.pid for rank in self.ranks if rank.is_alive()]
        for pid in list(found):
            try:
                found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except OSError:
                continue
        return found

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def end(self) -> int:
        """Wait for the processes that are left; those that do not end are killed. Returns how many."""
        self.wait(SURVIVORS)
        left = [rank for rank in self.ranks if rank.is_alive()]
        for rank in left:
            os.kill(rank.pid, signal.SIGUSR2)
        time.sleep(0.5 * bool(left))
        self.stacks = [(self.folder / f"output{self.ranks.index(rank)}").read_text()[-2500:] for rank in left]
        for rank in left:
            rank.kill()
        for rank in self.ranks:
            rank.join()
        return len(left)

    @property
    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    @property
    def failed(self) -> bool:
        return any(rank.exitcode for rank in self.ranks)

    def started_at(self) -> int | None:
        return json.loads(self.report.read_text()) if self.report.exists() else None


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, contents compared; 0 if there is none."""
    try:
        return int(last_complete_checkpoint(run, contents=True).name.rpartition("-")[2])
    except ValueError:
        return 0


def named(run: Path) -> int:
    """The highest step among the names."""
    return max((int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")), default=0)


@dataclass(frozen=True)
class Undisturbed:
    """The state at the end of a run that nobody kills, and how long its parts take, in seconds."""

    state: dict[str, torch.Tensor]
    start: float
    save: float
    end: float


def undisturbed(variant: Variant, folder: Path) -> Undisturbed:
    folder.mkdir(parents=True)
    attempt, begin = Attempt(variant, folder, 0), time.monotonic()
    attempt.wait(ATTEMPT, lambda: attempt.saving)
    start = time.monotonic() - begin
    attempt.wait(ATTEMPT, lambda: not attempt.saving)
    save = time.monotonic() - begin - start
    attempt.wait(ATTEMPT)
    end = time.monotonic() - begin
    if attempt.end() or attempt.failed:
        raise RuntimeError(f"The undisturbed run failed:\n{(folder / 'output0').read_text()[-3000:]}")
    return Undisturbed(torch.load(folder / RESULT, weights_only=True), start, save, end)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """Which tensors differ, and by how much at most."""
    names = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    far = max((float((one[n].double() - other[n].double()).abs().max()) for n in names if n in other), default=0.0)
    return f"{len(names)} of {len(other)} tensors differ by up to {far:.3g}, the first is {names[:1]}"


def _wait_for_moment(attempt: Attempt, known: Undisturbed, chance: random.Random) -> None:
    """Most kills wait for a save, the first or a later one, and then for a part of its time."""
    if chance.random() < 0.35:
        attempt.wait(chance.uniform(0, known.start + (known.end - known.start) * 0.4))
        return
    for _ in range(chance.randrange(3)):
        attempt.wait(ATTEMPT, lambda: attempt.saving)
        attempt.wait(ATTEMPT, lambda: not attempt.saving)
    while attempt.running:
        attempt.wait(ATTEMPT, lambda: attempt.saving)
        time.sleep(chance.uniform(0, known.save))
        if attempt.saving:  # else it was over sooner than that
            return


def _attempt(attempt: Attempt, known: Undisturbed, tally: Tally, chance: random.Random) -> int:
    """One start and its kill. Returns the newest step that was seen in its place then."""
    _wait_for_moment(attempt, known, chance)
    saving, alive = attempt.saving, attempt.processes()
    attempt.was_saving = saving
    killed = bool(alive)
    if killed:
        attempt.kill(alive if chance.random() < 0.25 else [chance.choice(alive)])
        tally.during_save += saving and attempt.saving
        tally.kills += 1
    seen = named(attempt.run)
    tally.stalled += attempt.end()
    tally.notes += attempt.stacks
    if not killed and attempt.failed:
        tally.failed += 1
        tally.notes.append((attempt.folder / "output0").read_text()[-1500:])
    return seen


def _to_the_end(attempt: Attempt, tally: Tally) -> None:
    attempt.wait(ATTEMPT)
    tally.stalled += attempt.end()
    tally.failed += attempt.failed


def soak(variant: Variant, folder: Path, kills: int, until: float, seed: int) -> Tally:
    """Kill runs of a variant `kills` times, or until the clock (`time.monotonic()`) says `until`, and let each come to
    its end."""
    begin, chance, tally = time.monotonic(), random.Random(f"{variant.name}-{seed}"), Tally()
    known = undisturbed(variant, folder / "undisturbed")
    while tally.kills < kills and time.monotonic() < until and tally.failed < 3:
        run = folder / f"run{tally.runs}"
        run.mkdir()
        number = reached = 0
        starts: list[str] = []
        while not (run / RESULT).exists() and tally.failed < 3:
            number += 1
            reached = max(reached, newest(run / "run"))
            attempt = Attempt(variant, run, number)
            if tally.kills >= kills or time.monotonic() >= until:
                seen = 0
                _to_the_end(attempt, tally)
            else:
                seen = _attempt(attempt, known, tally, chance)
            if (started := attempt.started_at()) is not None and started < reached:
                tally.lost += 1
                tally.notes.append(f"started at {started}, but {reached} had been there")
            starts.append(f"{started}-{seen}{'s' if attempt.was_saving else ''}{attempt.codes}")
            reached = max(reached, seen)
        if (run / RESULT).exists():
            tally.runs += 1
            found = torch.load(run / RESULT, weights_only=True)
            if not same(found, known.state):
                tally.wrong += 1
                tally.notes.append(f"{differences(found, known.state)}; first and last steps of the starts: {starts}")
            shutil.rmtree(run)
    tally.seconds = round(time.monotonic() - begin, 1)
    return tally
