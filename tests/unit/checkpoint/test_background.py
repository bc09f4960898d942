"""Writing beside training: what was copied is written, errors come back, and the process ends with its trainer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_veomni.checkpoint import writer
from hf_veomni.checkpoint.background import BackgroundError, BackgroundWriter
from hf_veomni.checkpoint.manifest import find_damage
from hf_veomni.checkpoint.shards import plan_shard
from hf_veomni.checkpoint.writer import note_path, write_note


@pytest.fixture
def background() -> Iterator[BackgroundWriter]:
    made = BackgroundWriter()
    yield made
    made.close(0)


def begin(root: Path, step: int = 8) -> Path:
    staging = root / f".incomplete/checkpoint-{step}"
    staging.mkdir(parents=True)
    note_path(staging, 0).parent.mkdir()
    return staging


def tensors() -> dict[str, torch.Tensor]:
    return {
        "wide": torch.randn(300, 40, dtype=torch.float64),
        "bits": torch.randn(7) > 0,
        "turned": torch.randn(6, 5).to(torch.bfloat16).t(),
        "step": torch.tensor(2.0),
    }


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_copy_is_written_while_the_tensors_change(tmp_path: Path, background: BackgroundWriter) -> None:
    """The writer of rank 0 waits for that of rank 1, which answers when the tensors are other ones."""
    for step in (8, 16):
        state = tensors() if step == 8 else {"more": torch.randn(5000, 40), **tensors()}
        expected = {name: tensor.clone() for name, tensor in state.items()}
        staging = begin(tmp_path, step)
        (staging / "config.json").write_text("{}")
        target = tmp_path / f"checkpoint-{step}"
        shards = [plan_shard(state, staging / "one.safetensors"), plan_shard(state, staging / "two.safetensors")]
        background.start(shards, staging, target, 0, 2)
        for tensor in state.values():
            tensor.zero_()
        assert background.poll() is None and background.busy
        with pytest.raises(AssertionError, match="is not to be overwritten"):
            background.start([], staging, target, 0, 2)
        time.sleep(0.1)
        assert not target.exists()
        write_note(staging, 1, {"files": {}})
        assert background.wait() is None and not background.busy
        assert find_damage(target, contents=True) is None
        assert not (tmp_path / ".incomplete").exists()
        for name in ("one", "two"):
            found = load_file(target / f"{name}.safetensors")
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_process_holds_no_torch(tmp_path: Path, background: BackgroundWriter) -> None:
    background.start([], begin(tmp_path), tmp_path / "checkpoint-8", 0, 2)
    time.sleep(0.3)
    maps = Path(f"/proc/{background.pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps and "numpy" not in maps


def test_errors_come_back(tmp_path: Path, background: BackgroundWriter) -> None:
    staging = begin(tmp_path)
    shards = [plan_shard(tensors(), staging / "nowhere/one.safetensors")]
    background.start(shards, staging, tmp_path / "checkpoint-8", 1, 2)
    error = background.wait()
    assert isinstance(error, BackgroundError) and "checkpoint-8' beside training failed: FileNotFound" in str(error)
    background.start([], staging, tmp_path / "checkpoint-8", 0, 2)
    error = background.wait()
    assert "rank 1 could not write its part: FileNotFoundError" in str(error)
    assert not (tmp_path / "checkpoint-8").exists()


def test_a_full_disk_keeps_no_part_and_gives_room_to_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written of the part goes first; and if there is no room even then, the error is that of the part."""
    staging, whole = begin(tmp_path), writer.write_file
    files = [{"name": name, "header": "", "range": [0, 4]} for name in ("one", "two")]
    job = {"staging": str(staging), "target": str(tmp_path / "checkpoint-8"), "rank": 1, "world": 2, "files": files}

    def full(path: Path, header: bytes, data: memoryview) -> Any:
        known = whole(path, header, data)
        if path.name == "two":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return known

    def no_note(*args: Any) -> None:
        assert not (staging / "one").exists()
        raise OSError(errno.ENOSPC, "No space left on device", "the note")

    monkeypatch.setattr(writer, "write_file", full)
    with pytest.raises(OSError, match="/two'"):
        writer.run_job(job, memoryview(b"0123"))
    assert "No space left" in note_path(staging, 1).read_text()
    assert not (staging / "one").exists() and not (staging / "two").exists()
    monkeypatch.setattr(writer, "write_note", no_note)
    with pytest.raises(OSError, match="/two'"):
        writer.run_job(job, memoryview(b"0123"))


def test_a_save_that_is_given_up_makes_way_for_the_next(tmp_path: Path, background: BackgroundWriter) -> None:
    background.start([], begin(tmp_path), tmp_path / "checkpoint-8", 0, 2)  # of rank 1 nothing will ever come
    assert background.wait(0.2) is None and background.busy
    pid = background.pid
    background.cancel()
    assert pid is not None and not background.busy and not Path(f"/proc/{pid}").exists()
    background.start([], begin(tmp_path, 16), tmp_path / "checkpoint-16", 0, 1)
    assert background.wait() is None and (tmp_path / "checkpoint-16").is_dir()


def test_a_killed_writer_is_told_and_replaced(tmp_path: Path, background: BackgroundWriter) -> None:
    staging = begin(tmp_path)
    background.start([], staging, tmp_path / "checkpoint-8", 0, 2)
    assert background.pid is not None
    os.kill(background.pid, signal.SIGKILL)
    assert "ended with exit code -9" in str(background.wait())
    assert "exit code -9" in note_path(staging, 0).read_text()
    note_path(staging, 0).unlink()
    background.start([plan_shard(tensors(), staging / "one.safetensors")], staging, tmp_path / "checkpoint-8", 0, 1)
    assert background.wait() is None
    assert load_file(tmp_path / "checkpoint-8/one.safetensors").keys() == tensors().keys()


_TRAINER = """
import sys, time
from pathlib import Path
from hf_veomni.checkpoint import writer
from hf_veomni.checkpoint.background import BackgroundWriter
writer = BackgroundWriter()
writer.start([], Path(sys.argv[1]), Path(sys.argv[1]).parent, 0, 2)
print(writer.pid, flush=True)
time.sleep(60)
"""


def test_the_process_ends_with_a_killed_trainer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TRAINER, str(begin(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        assert not ended(pid)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)  # a scheduler's, to all processes: the writer goes on
        time.sleep(0.3)
        assert not ended(pid)
        trainer.kill()
    end = time.monotonic() + 10
    while not ended(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert ended(pid)


def test_a_rank_whose_part_does_not_come_is_named_after_the_limit(tmp_path: Path) -> None:
    made = BackgroundWriter(limit=1.0)
    try:
        staging, target = begin(tmp_path), tmp_path / "checkpoint-8"
        made.start([plan_shard(tensors(), staging / "one.safetensors")], staging, target, 0, 2)
        error = made.wait(30)
        assert not made.busy and not target.exists()
        assert isinstance(error, BackgroundError) and "ranks [1] have not written their parts within 1 s" in str(error)
    finally:
        made.close(0)
