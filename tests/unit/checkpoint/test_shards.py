"""Sharded state on disk: what was written comes back, what is damaged or of another model is named, no code runs."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hf_veomni
from hf_veomni.checkpoint.plain import load_plain
from hf_veomni.checkpoint.shards import INDEX, ShardReader, read_state, shard_name, write_state
from hf_veomni.errors import UnsupportedError
from hf_veomni.hf.weights import find_weight_files
from tests.models import build_model


def state() -> dict[str, Any]:
    return {
        "weight": torch.arange(12.0).view(3, 4),
        "half": torch.randn(5).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "maximize": False,
        "foreach": None,
    }


def blank() -> dict[str, Any]:
    zeros = {name: torch.zeros_like(value) for name, value in state().items() if isinstance(value, torch.Tensor)}
    return {**zeros, "lr": 0.0, "betas": (0.0, 0.0), "maximize": True, "foreach": True}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    written, found = state(), blank()
    write_state(written, tmp_path)
    read_state(found, tmp_path, "the state")
    for name, value in written.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same and type(found[name]) is type(value), name


def test_a_part_is_put_together_from_several_files(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    for rank, (begin, end) in enumerate(((0, 2), (2, 5), (5, 6))):
        info = json.dumps({"w": {"saved_offsets": [begin, 0]}})
        save_file({"w": whole[begin:end].clone()}, tmp_path / shard_name(rank), {"DCP_SHARDING_INFO": info})
    index: dict[str, Any] = {"version": 1, "files": 3, "shapes": {"w": [6, 4]}, "values": {}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with ShardReader(tmp_path) as reader:
        assert torch.equal(reader.read("w", (slice(1, 6), slice(1, 3))), whole[1:6, 1:3])
        assert torch.equal(reader.lazy("w").read(), whole)
    (tmp_path / INDEX).write_text(json.dumps({**index, "files": 2}))
    with ShardReader(tmp_path) as reader, pytest.raises(ValueError, match="holds 'w' in part only"):
        reader.read("w", (slice(1, 6), slice(1, 3)))


def _shapes() -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state().items() if isinstance(value, torch.Tensor)}


def _change(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps({**index, name: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), "missing or incomplete"),
        (lambda folder: (folder / INDEX).write_text(""), "index.json' cannot be read"),
        (lambda folder: (folder / INDEX).write_text("[]"), "index.json' cannot be read"),
        (_change("shapes", ["weight"]), "index.json' cannot be read"),
        (_change("version", 2), "has version 2"),
        (_change("files", 2), "shard-00002.*is missing"),
        (_change("shapes", {}), "is no file of a sharded checkpoint"),
        (_change("shapes", {**_shapes(), "weight": [2, 4]}), "is outside of"),
        (_change("shapes", {**_shapes(), "weight": [12]}), "is no file of a sharded checkpoint"),
        (lambda folder: (folder / shard_name(0)).unlink(), "is missing"),
        (lambda folder: (folder / shard_name(0)).write_bytes(b""), "is no file of a sharded checkpoint"),
        (lambda folder: (folder / shard_name(0)).write_bytes(b"\xff" * 64), "is no file of a sharded checkpoint"),
        (lambda folder: save_file({"weight": torch.ones(1)}, folder / shard_name(0)), "is no file of a sharded"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_state(state(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_state(blank(), tmp_path, "the state")


def test_another_state_is_refused(tmp_path: Path) -> None:
    write_state(state(), tmp_path)
    with pytest.raises(ValueError, match=r"unlike this thing it lacks 'more'\."):
        read_state({**blank(), "more": torch.ones(1)}, tmp_path, "this thing")
    with pytest.raises(ValueError, match="'weight' has shape .3, 4., but the state here has .4, 3."):
        read_state({**blank(), "weight": torch.ones(4, 3)}, tmp_path, "the state")
    with pytest.raises(ValueError, match="lacks 'momentum': it was written by a run with another optimizer"):
        read_state({**blank(), "momentum": 0.9}, tmp_path, "the state")
    with pytest.raises(UnsupportedError, match="'lr' .set. cannot be written"):
        write_state({"lr": {1}}, tmp_path)


def test_files_are_read_within_their_folder_only(tmp_path: Path) -> None:
    model = build_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a file outside of its folder"):
        load_plain(model, folder)
    with pytest.raises(OSError, match="names a file outside of the folder"):
        find_weight_files(folder)


def test_no_pickle_is_loaded_without_weights_only() -> None:
    root = Path(hf_veomni.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            call = ast.unparse(node.func)
            assert call not in ("pickle.load", "pickle.loads", "torch.package"), path
            if call == "torch.load":
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert options.get("weights_only") == "True", path
