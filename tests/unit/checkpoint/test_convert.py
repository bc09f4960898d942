"""A stranger's folder runs no code in `convert`, and takes nothing along from outside of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_veomni.checkpoint.convert import _copy_others, _write_model
from hf_veomni.checkpoint.files import staged
from hf_veomni.errors import UnsupportedError


def test_code_of_a_checkpoint_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    reader: Any = None  # the configuration comes first
    monkeypatch.setattr("builtins.input", lambda *args: asked.append("yes?") or "y")
    folder = tmp_path / "checkpoint-8"
    folder.mkdir()
    auto = {"AutoConfig": "configuration_evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "architectures": ["E"], "auto_map": auto}))
    (folder / "configuration_evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="not a config of transformers.*code from a checkpoint is not run"):
        _write_model(reader, folder, tmp_path / "out", (), 1)
    assert not asked


@pytest.mark.parametrize("place", ["notes.txt", "more/notes.txt", "folder"])
def test_links_that_lead_out_are_refused(tmp_path: Path, place: str) -> None:
    secret, folder, out = tmp_path / "secret", tmp_path / "checkpoint-8", tmp_path / "out"
    secret.mkdir()
    (secret / "key").write_text("private")
    (folder / place).parent.mkdir(parents=True)
    out.mkdir()
    (folder / place).symlink_to(secret if place == "folder" else secret / "key")
    with pytest.raises(ValueError, match=rf"{place}' is a link that leads out of the checkpoint \(to '.*secret"):
        _copy_others(folder, out)
    assert not [path for path in out.rglob("*") if path.is_file() or path.is_symlink()]


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blob, folder, out = tmp_path / "blobs/ab12", tmp_path / "snapshots/abc/checkpoint-8", tmp_path / "out"
    for made in (blob.parent, folder, out):
        made.mkdir(parents=True)
    blob.write_text("{}")
    (folder / "config.json").symlink_to("../../../blobs/ab12")
    _copy_others(folder, out)
    assert (out / "config.json").read_text() == "{}" and not (out / "config.json").is_symlink()


def test_a_folder_that_is_converted_in_place_is_not_copied_into_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with staged(tmp_path) as out:
        _copy_others(tmp_path, out)
        assert [entry.name for entry in out.iterdir()] == ["config.json"]
