"""Damaged folders: each is read as it was, or refused with an error of ours; no traceback from below, no hang."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_veomni.checkpoint.manifest import MANIFEST, find_damage, recover, write_manifest
from hf_veomni.checkpoint.shards import INDEX, read_state, shard_name, write_state

FILES = (INDEX, shard_name(0), MANIFEST)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["files", "shapes", "w"]), inner),
    max_leaves=6,
)
_KEYS = st.sampled_from(["version", "files", "shapes", "values"])


def _state() -> dict[str, Any]:
    return {"w": torch.arange(12.0).view(3, 4), "step": torch.tensor(3), "lr": 0.1, "betas": (0.9, 0.95)}


def _blank() -> dict[str, Any]:
    return {"w": torch.zeros(3, 4), "step": torch.tensor(0), "lr": 0.0, "betas": (0.0, 0.0)}


def _change_header(path: Path, offsets: Any) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps({"w": {"saved_offsets": offsets}, "step": offsets})
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _damage(folder: Path, name: str, how: str, place: int, value: Any, key: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[: place % len(data)])
    elif how == "flip":
        data[place % len(data)] ^= 1 + place % 255
        path.write_bytes(data)
    elif how == "remove":
        path.unlink()
    elif how == "replace":
        path.write_text(json.dumps(value))
    elif name == shard_name(0):
        _change_header(path, value)
    else:
        path.write_text(json.dumps({**json.loads(data), key: value}))


@settings(max_examples=300, deadline=2000)
@given(
    st.sampled_from(FILES), st.sampled_from(["cut", "flip", "remove", "replace", "change"]), st.integers(0, 5000),
    _JSON, _KEYS,
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(name: str, how: str, place: int, value: Any, key: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "checkpoint-1"
        write_state(_state(), folder)
        write_manifest(folder)
        before = (folder / name).read_bytes()
        _damage(folder, name, how, place, value, key)
        same = (folder / name).exists() and (folder / name).read_bytes() == before
        damage = find_damage(folder, contents=True)
        assert (damage is None) == same or name == MANIFEST, damage
        try:
            read_state(_blank(), folder, "the state")
        except ValueError as error:
            assert str(folder) in str(error)
        (Path(root) / ".incomplete").mkdir()
        shutil.move(folder, Path(root) / ".incomplete")
        assert len(recover(Path(root))) == (find_damage(folder) is None)
