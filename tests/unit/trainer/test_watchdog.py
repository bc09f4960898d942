"""What rank 0 makes of the reports of all."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_veomni.checkpoint import BackgroundWriter, plain
from hf_veomni.checkpoint.manifest import flush
from hf_veomni.trainer import in_use, watchdog
from hf_veomni.trainer.guarding import Progress
from hf_veomni.trainer.in_use import sole_use
from hf_veomni.trainer.watchdog import Report, Watchdog, describe_stack, is_of_exchange, judge, takes_its_time

FINE = Report(1, 10, "micro-batch 1 of step 3", "model.py:3 in forward", False, 1.0, 60.0)
WAITS = replace(FINE, waits=True, age=70.0, waited=70.0)
QUIET = [0.0, 0.0, 0.0]


def test_nothing_is_wrong_while_somebody_moves() -> None:
    assert judge([FINE, FINE, FINE], QUIET) is None
    assert judge([FINE, WAITS, WAITS], QUIET) is None  # two wait for one that computes
    assert judge([replace(FINE, age=50.0), replace(FINE, count=11, age=70.0)], QUIET[:2]) is None


def test_a_rank_that_has_not_spoken_yet_is_waited_for() -> None:
    assert judge([FINE, None, FINE], QUIET) is None
    assert judge([WAITS, None, WAITS], [0.0, 999.0, 0.0]) is None  # `train` was not called on it so far
    assert judge([FINE, replace(WAITS, ended="done"), FINE], QUIET) is None


def test_the_one_that_is_behind_is_named() -> None:
    behind = replace(FINE, count=9, age=61.0, place="reading the batches of step 3", stack="data.py:7 in read")
    found = judge([WAITS, behind, WAITS], QUIET)
    assert found is not None and found[0] == "stalled"
    assert found[1].startswith("No progress: rank 1 for 61 s in reading the batches of step 3 (data.py:7 in read).")
    assert "Ranks 0, 2 wait." in found[1]


def test_of_those_at_the_same_place_the_one_that_does_not_wait() -> None:
    found = judge([WAITS, replace(FINE, age=70.0), WAITS], QUIET)
    assert found is not None and "rank 1 for 70 s" in found[1] and "rank 0 for" not in found[1]


def test_all_are_named_where_all_wait() -> None:
    found = judge([WAITS, WAITS], QUIET[:2])
    assert found is not None and "rank 0 for 70 s" in found[1] and "rank 1 for 70 s" in found[1]


def test_an_error_comes_before_silence_and_silence_before_a_stall() -> None:
    reports: list[Report | None] = [WAITS, replace(FINE, ended="ValueError: no such row"), WAITS]
    assert judge(reports, [0.0, 99.0, 99.0]) == ("failed", "Rank 1 failed: ValueError: no such row")
    found = judge([WAITS, replace(FINE, age=70.0), WAITS], [0.0, 0.0, 31.0])
    assert found is not None and found[0] == "lost" and "heard of rank 2 for 31 s" in found[1]


def test_those_that_fell_silent_together_are_named_together() -> None:
    found = judge([FINE, FINE, FINE], [0.0, 30.5, 29.5])
    assert found is not None and found[1].startswith("Nothing has been heard of ranks 1, 2 for 30 s")


def test_silence_counts_sooner_where_an_exchange_broke_off() -> None:
    assert judge([FINE, FINE], [0.0, 6.0]) is None
    found = judge([replace(FINE, broken=True), FINE], [0.0, 6.0])
    assert found is not None and found[0] == "lost" and "heard of rank 1 for 6 s" in found[1]


def _spend(progress: Progress, seconds: float, **kind: bool) -> None:
    progress.at("somewhere", **kind)
    progress.since -= seconds


def test_a_part_may_take_ten_times_its_longest() -> None:
    progress = Progress(since=time.monotonic())
    _spend(progress, 7.0)
    _spend(progress, 500.0, measured=False, limited=False)  # a save, which is no measure
    progress.at("after")
    assert 70.0 <= progress.usual < 71.0 and progress.count == 3


def test_of_a_part_without_a_limit_yet_twice_as_long() -> None:
    """A second step that compiles again for minutes must not let the third one stand still for half an hour."""
    progress = Progress(since=time.monotonic())
    _spend(progress, 200.0, limited=False)
    progress.at("after")
    assert 400.0 <= progress.usual < 401.0


PATIENT = replace(FINE, limit=1800.0, patient=True, place="evaluating a batch")


def test_what_has_no_limit_may_take_as_long_as_others_would_wait() -> None:
    assert judge([replace(PATIENT, age=3000.0)] * 2, QUIET[:2]) is None  # both at work, and nobody waits
    assert judge([replace(PATIENT, age=3000.0), replace(WAITS, count=11, waited=1700.0)], QUIET[:2]) is None
    assert judge([replace(PATIENT, age=70.0), replace(WAITS, count=10)], QUIET[:2]) is None
    found = judge([replace(PATIENT, age=3000.0), replace(WAITS, count=11, waited=1801.0)], QUIET[:2])
    assert found is not None and "rank 0 for 3000 s in evaluating a batch" in found[1]
    assert "`wait_timeout`" in found[1] and "`stall_timeout`" not in found[1]


def test_who_has_worked_long_before_it_waits_has_not_waited_long() -> None:
    """Both compile for half an hour, and one is through: its time there is no time that it waits."""
    both = replace(PATIENT, age=1900.0)
    assert judge([both, replace(both, waits=True, waited=2.0)], QUIET[:2]) is None


def test_waiting_is_counted_at_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    dog = object.__new__(Watchdog)
    dog.progress, dog._main, dog._limit, dog._patience = Progress(), threading.get_ident(), 60.0, 1800.0
    dog._ended, dog._broken, dog._beats, dog._waits_at, dog._waits_since = "", False, 0, (0, ""), 0.0
    clock, where = [100.0], ["one", True]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog, "describe_stack", lambda frame: tuple(where))

    def seen(stack: str, waits: bool) -> float:
        clock[0] += 5.0
        where[:] = [stack, waits]
        return dog._report().waited

    assert [seen("one", True), seen("one", True), seen("one", True)] == [0.0, 5.0, 10.0]
    assert [seen("two", True), seen("two", True)] == [0.0, 5.0]  # another exchange: it moves
    assert [seen("two", False), seen("two", True), seen("two", True)] == [0.0, 5.0, 10.0]
    dog.progress.at("the next place")
    assert seen("two", True) == 0.0


class _Large:
    """What a frame of the main thread has at hand."""


@pytest.mark.parametrize("from_main", [True, False], ids=["main", "beside"])
def test_a_report_keeps_nothing_of_the_main_thread(from_main: bool) -> None:
    """Without a look for cycles, which comes late: activations would stay on the device until then."""
    dog = object.__new__(Watchdog)
    vars(dog).update(
        progress=Progress(since=0.0), _main=threading.get_ident(), _limit=60.0, _patience=60.0, _beats=0,
        _waits_at=(0, ""), _waits_since=0.0, _ended="", _broken=False,
    )  # fmt: skip

    def step() -> weakref.ref[_Large]:
        large = _Large()
        if from_main:
            dog._report()
        else:
            thread = threading.Thread(target=dog._report)
            thread.start()
            thread.join()
        return weakref.ref(large)

    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()


def test_a_store_that_does_not_answer_keeps_nobody_from_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    monkeypatch.setattr(watchdog, "_PERIOD", 0.1)
    dog, answers = object.__new__(Watchdog), threading.Event()
    vars(dog).update(
        _threads=[], _stopped=threading.Event(), _lock=threading.Lock(), _exchange=answers.wait,
        _board=SimpleNamespace(rank=0),
    )  # fmt: skip
    leaving = threading.Thread(target=dog.stop, args=(None,), daemon=True)
    leaving.start()
    leaving.join(5)
    assert not leaving.is_alive() and hasattr(dog, "_board")
    answers.set()


def _frame(target: Callable[[Callable[[], None]], object]) -> tuple[Any, threading.Event]:
    """Of a thread that `target` keeps in the call that it is given, until the event is set."""
    event, inside = threading.Event(), threading.Event()

    def waits() -> None:
        inside.set()
        event.wait(30)

    thread = threading.Thread(target=target, args=(waits,), daemon=True)
    thread.start()
    assert inside.wait(30) and thread.ident is not None
    return sys._current_frames()[thread.ident], event


def _in_a_callback(wait: Callable[[], None]) -> None:
    class Slow(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wait()

    handler = CallbackHandler([Slow()], None, None, None, None)
    handler.on_step_end(TrainingArguments("x"), TrainerState(), TrainerControl())


def _in_a_compilation(wait: Callable[[], None]) -> None:
    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        wait()
        return graph.forward

    torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(2))


def test_callbacks_and_compilations_take_their_time() -> None:
    idle, end_idle = _frame(lambda wait: wait())
    called, end_callback = _frame(_in_a_callback)
    compiled, end_compilation = _frame(_in_a_compilation)
    try:
        assert not takes_its_time(idle, [idle])
        assert takes_its_time(called, [idle])
        assert takes_its_time(compiled, [idle]) and takes_its_time(idle, [compiled])
        assert not takes_its_time(idle, [called])  # of another trainer
    finally:
        for event in (end_idle, end_callback, end_compilation):
            event.set()


def test_the_stack_names_the_innermost_line_and_whose_it_is() -> None:
    def sleeps(event: threading.Event) -> None:
        event.wait(30)

    event = threading.Event()
    thread = threading.Thread(target=sleeps, args=(event,), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert thread.ident is not None
    stack, waits = describe_stack(sys._current_frames()[thread.ident])
    event.set()
    assert "threading.py" in stack and "test_watchdog.py" in stack and stack.endswith("in sleeps")
    assert not waits


def _waits_for_the_writer(folder: Path, patch: pytest.MonkeyPatch) -> None:
    writer, (reading, _) = BackgroundWriter(), os.pipe()
    writer._job, writer._process = {}, SimpleNamespace(stdout=os.fdopen(reading))  # type: ignore[assignment]
    writer.wait()


def _flushes(folder: Path, patch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "slow")
    flush(folder / "slow")  # opening it waits for somebody to write


def _waits_for_the_folder(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(in_use, "_try_lock", lambda *args: False)
    with suppress(ValueError), sole_use(folder):
        pass


def _copies_what_was_gathered(folder: Path, patch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    lock.acquire()
    tensor = SimpleNamespace(detach=lambda: SimpleNamespace(cpu=lock.acquire))
    model: Any = SimpleNamespace(named_parameters=lambda **kwargs: [], state_dict=lambda: {"weight": tensor})
    for name, found in (("stage_of", None), ("find_layouts", {})):
        patch.setattr(plain, name, lambda model, found=found: found)
    plain.gather_full_state(model, keep=True)


@pytest.mark.parametrize(
    ("target", "name", "expected"),
    [
        (_waits_for_the_writer, "_receive", False),
        (_flushes, "flush", False),
        (_waits_for_the_folder, "_lock", False),
        (_copies_what_was_gathered, "gather_full_state", True),
    ],
)
def test_a_disk_is_no_other_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Callable[..., None], name: str, expected: bool
) -> None:
    """A rank that waits for files is the one that others wait for, and where all do, none waits for another."""
    thread = threading.Thread(target=target, args=(tmp_path, monkeypatch), daemon=True)
    thread.start()
    end, found = time.monotonic() + 10, ("", not expected)
    while f"in {name}" not in found[0].partition(", from")[0] and time.monotonic() < end:
        time.sleep(0.05)
        assert thread.ident is not None
        found = describe_stack(sys._current_frames()[thread.ident])
    assert f"in {name}" in found[0] and found[1] == expected


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9"),
        RuntimeError("[/a/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistStoreError("wait timeout after 300ms, keys: /x"),
    ],
)
def test_errors_of_an_exchange_are_known(error: Exception) -> None:
    assert is_of_exchange(error)


def test_a_store_in_a_file_says_that_it_has_waited(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    store.set_timeout(timedelta(seconds=0.05))
    for wait in (lambda: store.wait(["x"], timedelta(seconds=0.05)), lambda: store.get("x")):
        with pytest.raises(RuntimeError) as caught:
            wait()
        assert is_of_exchange(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the request timed out"),
        RuntimeError("DataLoader timed out after 5 seconds"),
        RuntimeError("HTTP: connection reset by peer"),
        RuntimeError("datastore: broken pipe"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        TimeoutError("[gloo/x] timed out"),
    ],
)
def test_an_error_of_the_user_is_not_waited_for(error: Exception) -> None:
    """Half a minute, for news of a rank that is lost."""
    assert not is_of_exchange(error)
