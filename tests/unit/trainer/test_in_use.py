"""Two runs do not train into one folder; whatever ends the first one, the second goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_veomni.checkpoint.manifest import find_damage
from hf_veomni.trainer import OmniTrainer, OmniTrainingArguments, held_folders, in_use
from hf_veomni.trainer.held_folders import HeldFolders
from hf_veomni.trainer.in_use import IN_USE, confirm, sole_use
from tests.permissions import permissions_count
from tests.ranks.training import Run


@pytest.fixture(autouse=True)
def _waits_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_use, "_WAIT", 0.3)


@contextmanager
def another_process(folder: Path, then: Callable[[], Any] = lambda: None) -> Iterator[int]:
    """Holds the folder until it is killed, at the latest at the end of the block. `then`: what it does meanwhile."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with sole_use(folder):
                then()
                os.write(writing, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 4) == b"held"
        yield child
    finally:
        kill(child)
        os.close(reading)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def taken_by_another(folder: Path) -> bool:
    """Whether a process of its own gets the folder now."""
    child = os.fork()
    if child == 0:
        try:
            with sole_use(folder):
                os._exit(0)
        except ValueError:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_process_that_has_it_is_named(tmp_path: Path) -> None:
    with another_process(tmp_path) as other:
        with pytest.raises(
            ValueError, match=rf"{tmp_path}'\) is in use by another run \(process {other} on .*, since"
        ):
            with sole_use(tmp_path):
                pass
        kill(other)
        assert (tmp_path / IN_USE).exists()  # of the one that was killed: it means nothing
        with sole_use(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / IN_USE).read_text()
    assert not list(tmp_path.iterdir())


def _fork_worker() -> None:
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)


def test_a_worker_that_outlives_a_killed_trainer_does_not_keep_it(tmp_path: Path) -> None:
    with another_process(tmp_path, _fork_worker) as other:
        kill(other)
        with sole_use(tmp_path):
            pass


def test_trainers_of_one_process_share_it(tmp_path: Path) -> None:
    """Nested in any order; it is free when the last one has left."""
    with ExitStack() as second:
        with sole_use(tmp_path):
            second.enter_context(sole_use(tmp_path / "." / ".." / tmp_path.name))
        assert not taken_by_another(tmp_path)
        with sole_use(tmp_path):
            pass
        assert not taken_by_another(tmp_path)
    assert not list(tmp_path.iterdir()) and taken_by_another(tmp_path)


def test_a_lock_on_a_file_that_is_gone_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had it has removed the file between our opening and our lock: the next one would make another."""
    stock = in_use._try_lock

    def lock_late(descriptor: int) -> bool:
        monkeypatch.setattr(in_use, "_try_lock", stock)
        (tmp_path / IN_USE).unlink()
        return stock(descriptor)

    monkeypatch.setattr(in_use, "_try_lock", lock_late)
    with sole_use(tmp_path):
        assert not taken_by_another(tmp_path)


def test_the_file_of_another_run_is_left(tmp_path: Path) -> None:
    """Where somebody has removed ours while this process trains."""
    with sole_use(tmp_path):
        (tmp_path / IN_USE).unlink()
        (tmp_path / IN_USE).touch()
    assert (tmp_path / IN_USE).exists()


def test_a_lock_that_a_copy_of_the_folder_drops_is_taken_again(tmp_path: Path) -> None:
    with sole_use(tmp_path):
        (tmp_path / IN_USE).read_bytes()  # closes a descriptor of the file
        assert confirm(tmp_path)
        assert not taken_by_another(tmp_path)
        (tmp_path / IN_USE).unlink()
        assert confirm(tmp_path)
        assert not taken_by_another(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_run_has_got_meanwhile_is_told(tmp_path: Path) -> None:
    with sole_use(tmp_path):
        (tmp_path / IN_USE).read_bytes()
        with another_process(tmp_path) as other, pytest.raises(ValueError, match=f"in use by .*process {other} on"):
            confirm(tmp_path)
    with sole_use(tmp_path):  # not removed with the lock of the other one, nor kept
        pass


def test_the_file_of_another_run_that_has_the_lock_is_left(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with sole_use(tmp_path):
            (tmp_path / IN_USE).read_bytes()
            stack.enter_context(another_process(tmp_path))
        assert not taken_by_another(tmp_path)


def test_a_file_that_another_user_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / IN_USE).touch(0o444)
    with permissions_count(), sole_use(tmp_path):
        assert not taken_by_another(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_user_is_in_use_while_that_one_trains(tmp_path: Path) -> None:
    with another_process(tmp_path) as other:
        (tmp_path / IN_USE).chmod(0o444)
        with permissions_count(), pytest.raises(ValueError, match=f"in use by another run .process {other} on"):
            with sole_use(tmp_path):
                pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(in_use.logger, "propagate", True, raising=False)
    with caplog.at_level("WARNING"), sole_use(tmp_path):
        pass
    assert f"cannot be locked ({os.strerror(number)})" in caplog.text


def _trainer(folder: Path, **arguments: Any) -> OmniTrainer:
    run = Run()
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "output_dir": str(folder)} | arguments
    return OmniTrainer(model=run.model(), args=OmniTrainingArguments(**run.all_arguments(**arguments)), **run.data())


class _Watching(TrainerCallback):
    """Whether another run gets the folder when a checkpoint has been saved, for each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.free = folder, list[bool]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True
        if (path := self.folder / IN_USE).exists():
            path.read_bytes()  # drops the lock

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.free.append(taken_by_another(self.folder))


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_whoever_saves_has_the_folder_whatever_asked_for_it(tmp_path: Path, strategy: str) -> None:
    """A callback that asks for a checkpoint, and a copy of the folder that has dropped the lock."""
    trainer, watching = _trainer(tmp_path, save_strategy=strategy, max_steps=2), _Watching(tmp_path)
    trainer.add_callback(watching)
    trainer.train()
    assert watching.free == [False, False]
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("async_save", [False, True], ids=["plain", "async"])
def test_a_save_outside_of_train_gives_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    """Also after a `train` that has failed, which Trainer takes to be running still."""
    trainer = _trainer(tmp_path, save_strategy="no", max_steps=2, async_save=async_save)

    def fail(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "log", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    assert find_damage(tmp_path / "checkpoint-1", contents=True) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"] and taken_by_another(tmp_path)


def test_trials_of_a_search_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes share a search, and its folder."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})  # which asks packages of searches
    trainer, trial = _trainer(tmp_path), SimpleNamespace(number=3, params={})
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    with another_process(tmp_path):
        trainer.train(None, trial)  # type: ignore[arg-type]
    assert (tmp_path / "run-3" / "checkpoint-1").is_dir()
    with another_process(tmp_path / "run-3"), pytest.raises(ValueError, match=r"run-3'\) is in use by another run"):
        trainer.train(trial=trial)  # type: ignore[arg-type]


def test_a_folder_is_free_when_its_old_checkpoints_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are removed beside training, and one save waits for the removal of the one before it."""
    freed: list[bool] = []

    def free_slowly(root: Path) -> None:
        time.sleep(0.3)
        freed.append(taken_by_another(root))

    monkeypatch.setattr(held_folders, "remove_aside", free_slowly)
    folders = HeldFolders()
    folders.hold(tmp_path)
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        folders.rotate(tmp_path / f"checkpoint-{step}", 1, None, beside=True)
        assert len(freed) == max(0, step - 2)
    folders.close()
    assert freed == [False, False] and taken_by_another(tmp_path)


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    folders, folder = HeldFolders(), tmp_path / "run"
    folders.hold(folder)
    shutil.rmtree(folder)
    (tmp_path / "another").mkdir()  # which may get its number
    folders.hold(folder)
    assert not taken_by_another(folder)
    folders.close()
    assert taken_by_another(folder)
