"""A checkpoint is whole or does not count, whatever ends the process and whatever happens to its files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from hf_veomni.checkpoint import manifest
from hf_veomni.checkpoint.manifest import (
    MANIFEST,
    STAGING,
    find_damage,
    publish,
    recover,
    remove_aside,
    write_manifest,
)
from hf_veomni.trainer import folders
from hf_veomni.trainer.folders import (
    check_checkpoint,
    last_complete_checkpoint,
    later_checkpoints,
    put_surplus_aside,
)
from tests.permissions import permissions_count

# Calls that change what is on the disk, or order it.
_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


def save(root: Path, step: int, text: str) -> None:
    """What a trainer does: clean up, write beside, flush, describe, rename."""
    recover(root)
    staging = root / STAGING / f"checkpoint-{step}"
    (staging / "optimizer").mkdir(parents=True)
    (staging / "model.safetensors").write_text(text * 100)
    (staging / "optimizer" / "shard").write_text(text * 50)
    (staging / "trainer_state.json").write_text('{"global_step": 1}')
    write_manifest(staging)
    publish(staging, root / f"checkpoint-{step}")


def contents(root: Path, step: int) -> str:
    return (root / f"checkpoint-{step}" / "model.safetensors").read_text()[0]


def killed_at(number: int, function: Callable[[], Any]) -> bool:
    """Run `function` in a child that is killed before its call number `number`; whether there was such a call."""
    child = os.fork()
    if child == 0:
        left = [number]
        for name in _CALLS:
            original = getattr(os, name)

            def counted(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return _original(*args, **kwargs)

            setattr(os, name, counted)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", [8, 4], ids=["another step", "the same step again"])
def test_killed_at_every_call(tmp_path: Path, step: int) -> None:
    """A complete checkpoint is found after each kill, the old one or the new one, and the next save works."""
    number, states = 0, set()
    while True:
        root = tmp_path / str(number)
        root.mkdir()
        save(root, 4, "a")
        killed = killed_at(number, lambda root=root: save(root, step, "b"))
        recover(root)
        found = last_complete_checkpoint(root, contents=True)
        states.add((found.name, contents(root, int(found.name[11:]))))
        assert not (root / STAGING).exists()
        save(root, 12, "c")
        assert last_complete_checkpoint(root, contents=True).name == "checkpoint-12"
        if not killed:
            break
        number += 1
    assert number > 10
    assert states == {("checkpoint-4", "a"), (f"checkpoint-{step}", "b")}


def test_a_clean_up_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """A complete checkpoint whose rename did not happen, and the one that it replaces: one of them is found."""
    number = 0
    while True:
        root = tmp_path / str(number)
        root.mkdir()
        save(root, 4, "a")
        (root / STAGING).mkdir()
        (root / "checkpoint-4").rename(root / STAGING / "replaced-checkpoint-4")
        killed = killed_at(number, lambda root=root: recover(root))
        recover(root)
        assert last_complete_checkpoint(root, contents=True).name == "checkpoint-4"
        assert [entry.name for entry in root.iterdir()] == ["checkpoint-4"]
        if not killed:
            break
        number += 1
    assert number > 3


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a file that another process has open stays, by the name of `.nfs...`, and so does its folder."""
    stock = shutil.rmtree

    def rmtree(folder: Path, ignore_errors: bool = False) -> None:
        for path in [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".nfs")]:
            path.rename(path.with_name(f".nfs{path.name}"))
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        for step in (2, 4, 6):  # each finds what the one before has left, and leaves something itself
            (tmp_path / STAGING / f"checkpoint-{step + 1}").mkdir(parents=True)
            (tmp_path / STAGING / f"checkpoint-{step + 1}" / "model.safetensors").write_text("killed")
            save(tmp_path, step, "a")
        assert list(tmp_path.rglob(".nfs*"))
    assert [find_damage(tmp_path / f"checkpoint-{step}", contents=True) for step in (2, 4, 6)] == [None] * 3
    assert shutil.rmtree is stock
    recover(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def names(root: Path) -> set[str]:
    return {entry.name.removeprefix("checkpoint-") for entry in root.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("steps", "damaged", "written", "limit", "best", "left"),
    [
        ((2, 4, 6), (), 6, 2, None, {"4", "6"}),
        ((2, 4, 6), (), 6, None, None, {"2", "4", "6"}),
        ((2, 4, 6), (), 6, 1, 2, {"2", "6"}),
        ((2, 4, 8), (8,), 4, 1, None, {"4"}),  # went back behind a damaged one, all within a second
        ((2, 4, 8), (8,), 4, 2, None, {"2", "4"}),
        ((4, 8, 12), (), 4, 1, None, {"4"}),  # went back by hand
        ((2, 4, 6, 8), (4, 6), 8, 2, 2, {"2", "8"}),
        ((4, 6, 8, 12), (), 6, 2, None, {"4", "6"}),  # went back to 4: 8 and 12 are of what was left behind
        ((4, 6, 8, 12), (4,), 6, 2, None, {"6", "8"}),
        ((4, 6, 8, 12), (), 6, 3, None, {"4", "6", "8"}),
        ((4, 6, 8, 12), (), 6, 2, 12, {"6", "12"}),
    ],
)
def test_rotation_keeps_what_is_whole_and_the_best(
    tmp_path: Path, steps: tuple, damaged: tuple, written: int, limit: int | None, best: int | None, left: set[str]
) -> None:
    for step in steps:
        save(tmp_path, step, "a")
    for step in damaged:
        damage(tmp_path / f"checkpoint-{step}", "truncated")
    before = names(tmp_path)
    kept = None if best is None else str(tmp_path / f"checkpoint-{best}")
    removed = put_surplus_aside(tmp_path, limit, tmp_path / f"checkpoint-{written}", kept)
    assert names(tmp_path) == left
    assert {entry.name.removeprefix("checkpoint-") for entry in removed} == before - left


def test_disk_is_freed_beside_training(tmp_path: Path) -> None:
    """A checkpoint goes in one rename, so that a kill while its files are deleted leaves no half of it."""
    for step in (2, 4, 6, 8):
        save(tmp_path, step, "a")
    for limit, left in ((3, {"4", "6", "8"}), (1, {"8"})):
        put_surplus_aside(tmp_path, limit, tmp_path / "checkpoint-8", None)
        assert names(tmp_path) == left
        aside = [path for entry in tmp_path.iterdir() if entry.name not in left for path in entry.iterdir()]
        assert {path.name for path in aside} >= ({"checkpoint-2"} if limit == 3 else {"checkpoint-4", "checkpoint-6"})
        if limit == 3:
            remove_aside(tmp_path)
            assert len(list(tmp_path.iterdir())) == 3
    assert not recover(tmp_path)  # of a run that was killed before it had freed them
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-8"}


def test_a_checkpoint_that_is_write_protected_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, "a")
    (tmp_path / "checkpoint-2").chmod(0o555)
    monkeypatch.setattr(folders.logger, "propagate", True, raising=False)
    with permissions_count(), caplog.at_level("WARNING"):
        for limit, left in ((2, {"2", "4", "6"}), (1, {"2", "6"})):
            put_surplus_aside(tmp_path, limit, tmp_path / "checkpoint-6", None)
            remove_aside(tmp_path)
            assert {entry.name.removeprefix("checkpoint-") for entry in tmp_path.iterdir()} == left
    assert find_damage(tmp_path / "checkpoint-2", contents=True) is None
    assert caplog.text.count("checkpoint-2' is one more than `save_total_limit`, but cannot be removed (Perm") == 1


def test_a_checkpoint_that_cannot_be_moved_is_removed_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a layer of a container, or with a disk that has no space for another folder."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    for owner, name in ((Path, "rename"), (folders.tempfile, "mkdtemp")):
        save(tmp_path, 2, "a")
        save(tmp_path, 4, "a")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            put_surplus_aside(tmp_path, 1, tmp_path / "checkpoint-4", None)
        remove_aside(tmp_path)
        assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint-4"}


def test_later_checkpoints_are_whole_ones_beside_it(tmp_path: Path) -> None:
    for step in (2, 4, 8, 12):
        save(tmp_path, step, "a")
    damage(tmp_path / "checkpoint-8", "truncated")
    assert [found.name for found in later_checkpoints(tmp_path / "checkpoint-4")] == ["checkpoint-12"]
    assert not later_checkpoints(tmp_path / "checkpoint-12") and not later_checkpoints(tmp_path / "best")


def test_the_manifest_takes_no_file_that_was_cut(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("abc")
    with pytest.raises(OSError, match="has 3 bytes, but 4 were written"):
        write_manifest(tmp_path, {"shard": (4, "")})
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path, {"gone": (4, "")})


def damage(checkpoint: Path, kind: str) -> None:
    weights = checkpoint / "model.safetensors"
    if kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[3] ^= 1
        weights.write_bytes(data)
    elif kind == "truncated":
        os.truncate(weights, 10)
    elif kind == "removed":
        weights.unlink()
    elif kind == "manifest removed":
        (checkpoint / MANIFEST).unlink()
    elif kind == "manifest empty":
        (checkpoint / MANIFEST).write_text("")
    elif kind == "manifest of a list":
        (checkpoint / MANIFEST).write_text('{"files": ["model.safetensors"]}')
    elif kind == "manifest without sizes":
        (checkpoint / MANIFEST).write_text('{"files": {"model.safetensors": {}}}')
    elif kind == "manifest of nothing":
        (checkpoint / MANIFEST).write_text('{"version": 1, "files": {}}')
    elif kind == "link to itself":
        weights.unlink()
        weights.symlink_to(weights.name)
    elif kind == "long name":
        stored = json.loads((checkpoint / MANIFEST).read_text())
        stored["files"]["n" * 300] = {"bytes": 0, "sha256": ""}
        (checkpoint / MANIFEST).write_text(json.dumps(stored))
    elif kind == "outside":
        stored = json.loads((checkpoint / MANIFEST).read_text())
        stored["files"]["../secret"] = {"bytes": 0, "sha256": ""}
        (checkpoint / MANIFEST).write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped", r"the contents of 'model.safetensors' have changed"),
        ("truncated", r"'model.safetensors' has 10 bytes, not 100"),
        ("removed", r"'model.safetensors' is missing"),
        ("manifest removed", r"it has no manifest.json"),
        ("manifest empty", r"its manifest.json cannot be read"),
        ("manifest of a list", r"its manifest.json cannot be read"),
        ("manifest without sizes", r"its manifest.json cannot be read"),
        ("manifest of nothing", r"its manifest.json names no file"),
        ("link to itself", r"'model.safetensors' cannot be read \(Too many levels of symbolic links\)"),
        ("long name", r"'n{300}' cannot be read \(File name too long\)"),
        ("outside", r"names a file outside of it \('../secret'\)"),
    ],
)
def test_damage_is_named_and_hides_no_older_one(
    tmp_path: Path, kind: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 4, "a")
    save(tmp_path, 8, "b")
    damage(tmp_path / "checkpoint-8", kind)
    assert last_complete_checkpoint(tmp_path, contents=True).name == "checkpoint-4"
    if kind != "manifest removed":  # which may be the stock Trainer's
        with pytest.raises(ValueError, match=message):
            check_checkpoint(tmp_path / "checkpoint-8")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match=message):
        last_complete_checkpoint(tmp_path, contents=True)


def test_a_bad_sector_hides_no_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 4, "a")
    save(tmp_path, 8, "b")
    read = manifest.checksum

    def fails(path: Path) -> str:
        if path.parent.name == "checkpoint-8":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(manifest, "checksum", fails)
    assert last_complete_checkpoint(tmp_path, contents=True).name == "checkpoint-4"
    with pytest.raises(ValueError, match=r"cannot be read \(Input/output error\)"):
        check_checkpoint(tmp_path / "checkpoint-8")


def test_a_snapshot_of_the_hub_cache_is_whole(tmp_path: Path) -> None:
    """Its files are links to blobs outside of it."""
    save(tmp_path, 4, "a")
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()]:
        blob = blobs / path.name
        link = snapshot / path.relative_to(tmp_path / "checkpoint-4")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    check_checkpoint(snapshot)
    (blobs / "shard").write_text("other")
    with pytest.raises(ValueError, match="'optimizer/shard' has 5 bytes"):
        check_checkpoint(snapshot)


_WRONG = ('"epoch": "a"', '"epoch": NaN', '"max_steps": null', '"log_history": 3', '"log_history": [1]')
_WRONG += ('"stateful_callbacks": [1]', '"unknown": 1')


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "{", "[]", '{"epoch": 1}', *(f'{{"global_step": {value}}}' for value in ('"x"', -3, 1.5, "true"))),
        *(f'{{"global_step": 1, {wrong}}}' for wrong in _WRONG),
    ],
)
def test_a_stock_checkpoint_needs_its_state(tmp_path: Path, text: str | None) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    if text is not None:
        (checkpoint / "trainer_state.json").write_text(text)
    for described in (False, True):
        with pytest.raises(ValueError, match="is missing or incomplete .*trainer_state.json"):
            check_checkpoint(checkpoint)
        with pytest.raises(ValueError, match="No complete checkpoint"):
            last_complete_checkpoint(tmp_path)
        (checkpoint / "weights").write_text("a")
        if not described:  # a manifest of it makes it no better
            write_manifest(checkpoint)


def test_a_state_of_trainer_is_readable(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    callbacks: Any = [TrainerControl()]
    state = TrainerState(epoch=1.5, global_step=3, log_history=[{"loss": 1.0}], stateful_callbacks=callbacks)
    state.save_to_json(str(checkpoint / "trainer_state.json"))
    check_checkpoint(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    check_checkpoint(checkpoint)
    assert last_complete_checkpoint(tmp_path) == checkpoint


def test_nothing_there(tmp_path: Path) -> None:
    assert recover(tmp_path) == [] and find_damage(tmp_path / "no") == "it has no manifest.json"
    with pytest.raises(ValueError, match="No complete checkpoint"):
        last_complete_checkpoint(tmp_path / "no")
