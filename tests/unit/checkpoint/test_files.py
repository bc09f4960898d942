"""Directories that appear complete or not at all."""

from __future__ import annotations

import pytest

from hf_veomni.checkpoint import agree, staged, together
from tests.permissions import permissions_count


def test_a_new_directory_appears_whole(tmp_path):
    with staged(tmp_path / "a" / "b") as staging:
        (staging / "file").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "1"
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            with staged(tmp_path / name) as staging:
                (staging / "file").write_text("half")
                raise error
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_files_are_replaced_and_stale_weights_removed(tmp_path):
    target = tmp_path / "model"
    (target / "checkpoint-1").mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "notes.txt"):
        (target / name).write_text("old")
    (target / "model.safetensors.index.json").write_text("old")
    with staged(target) as staging:
        (staging / "model.safetensors").write_text("new")
        (staging / "config.json").write_text("new")
    assert sorted(entry.name for entry in target.iterdir()) == [
        "checkpoint-1",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert (target / "config.json").read_text() == "new" and (target / "notes.txt").read_text() == "old"


def test_a_folder_that_exists_is_written_without_one_beside_it(tmp_path):
    """A volume of a container, or a link to another disk: nothing can be made beside it, or moved from there."""
    (tmp_path / "model" / "_incomplete").mkdir(parents=True)
    (tmp_path / "model" / "_incomplete" / "half").touch()  # of a save that was killed
    tmp_path.chmod(0o555)
    try:
        with permissions_count(), staged(tmp_path / "model") as staging:
            (staging / "file").write_text("1")
    finally:
        tmp_path.chmod(0o755)
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["file"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match="is a file: name a directory"):
        with staged(tmp_path / "model"):
            pass
    assert (tmp_path / "model").read_text() == "a file"


def test_one_process_raises_its_own_error():
    agree(None, "nothing")
    with pytest.raises(KeyError, match="key"), together("the job"):
        raise KeyError("key")
