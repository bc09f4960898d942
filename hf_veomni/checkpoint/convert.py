"""Sharded checkpoints to plain ones, offline: one process, no accelerator, one file's tensors in memory at a time.
DeepSpeed's and FSDP's torch files (`foreign`) too.

    checkpoint-8/weights/       shards, by the names of the model that was trained
    checkpoint-8/config.json    what it is
    checkpoint-8/weights/adapters.json    for a PeftModel: names and layouts of PEFT's files

The names and arrangement of the plain files are those of stock `save_pretrained`: transformers' own reverse conversion
runs on tensors that are not read yet (`lazy`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from hf_veomni import hf
from hf_veomni.checkpoint.files import INSIDE, staged
from hf_veomni.checkpoint.foreign import find_torch_files, open_torch
from hf_veomni.checkpoint.manifest import MANIFEST, find_damage
from hf_veomni.checkpoint.plain import adapter_names, first_names, restore_class_name
from hf_veomni.checkpoint.shards import ShardReader, write_tensors
from hf_veomni.checkpoint.stages import join_facts
from hf_veomni.checkpoint.state import weights_state
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import AdapterLayout, find_layouts
from hf_veomni.hf import weights as hf_weights

WEIGHTS_DIRECTORY = "weights"
_ADAPTERS = "adapters.json"
MAX_BYTES = 5 * 10**9  # of a file
# What resuming needs and a plain model has not.
_LEFT_OUT = (WEIGHTS_DIRECTORY, "optimizer", "optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json")
_LEFT_OUT += ("training_args.bin", "data_position.json", MANIFEST, INSIDE)
_KEPT = (".json", ".txt", ".model", ".jinja")  # beside a torch file: configurations and the tokenizer


def describe_adapters(model: nn.Module) -> dict[str, Any]:
    """Names and layouts of PEFT's files, empty for a model without adapters. Collective with stages: `join_facts`."""
    if not isinstance(model, PeftModel):
        return {}
    layouts = {name: [layout.factor, layout.num_experts] for name, layout in find_layouts(model).items()}
    (layouts,) = join_facts([layouts], model)
    return {"names": adapter_names(model), "layouts": layouts}


def describe_model(model: nn.Module, directory: Path, adapters: dict[str, Any]) -> None:
    """Write what `convert` needs beside the shards: configurations, and `adapters`. Not a collective."""
    base = hf.base_model(model)
    if not isinstance(model, PeftModel):
        base.save_pretrained(directory, state_dict={})
        (directory / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        return
    state = model.state_dict()
    (directory / WEIGHTS_DIRECTORY / _ADAPTERS).write_text(json.dumps(adapters))
    model.save_pretrained(str(directory), state_dict={name: torch.empty(0) for name in state})
    for path in directory.rglob(ADAPTER_SAFE_WEIGHTS_NAME):
        path.unlink()
    restore_class_name(directory, base)


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    classes: Sequence[type[PreTrainedModel]] = (),
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write a sharded checkpoint as a folder that `from_pretrained` of transformers, or of PEFT, opens.

    Args:
        checkpoint: a checkpoint's directory, as `sharded_weights=True` makes it; or a folder with the torch file that
            DeepSpeed's zero_to_fp32.py or FSDP's FULL_STATE_DICT leave, and the model's config.json.
        out: the directory to write to; it appears complete, or stays as it was.
        classes: models beside those of transformers that the config may name.
        max_bytes: of a file of weights.

    Returns:
        The files of weights.

    Raises:
        ValueError: a checkpoint that is damaged, is none, or is plain already; or a link in it that leads out of it.
        UnsupportedError: a model whose class is none of transformers', or weights of DeepSpeed or FSDP in parts.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if files := find_torch_files(checkpoint):
        with staged(out) as staging:
            written = _write_foreign(files, checkpoint, staging, classes, max_bytes)
        return [out / path.relative_to(staging) for path in written]
    if not (checkpoint / WEIGHTS_DIRECTORY).is_dir():
        raise ValueError(
            f"'{checkpoint}' has no sharded weights (no '{WEIGHTS_DIRECTORY}' in it): name a checkpoint that was "
            "written with `sharded_weights=True`, or a folder with DeepSpeed's or FSDP's torch file. Other "
            "weights there are plain already."
        )
    if (checkpoint / MANIFEST).exists() and (damage := find_damage(checkpoint, contents=True)) is not None:
        raise ValueError(f"'{checkpoint}' is damaged ({damage}): convert an earlier one.")
    with ShardReader(checkpoint / WEIGHTS_DIRECTORY) as reader, staged(out) as staging:
        _copy_others(checkpoint, staging)
        if (checkpoint / WEIGHTS_DIRECTORY / _ADAPTERS).is_file():
            written = _write_adapters(reader, staging)
        else:
            written = _write_model(reader, checkpoint, staging, classes, max_bytes)
    return [out / path.relative_to(staging) for path in written]


def _check_links(checkpoint: Path, entry: Path) -> None:
    """A copy follows links, and what they lead to may be uploaded later: only to files of the folder, or of the Hub's
    cache that it lies in."""
    owners = [checkpoint.resolve()]
    owners += [
        folder.parent.resolve() / "blobs" for folder in checkpoint.absolute().parents if folder.name == "snapshots"
    ]
    for path in (entry, *(entry.rglob("*") if entry.is_dir() else ())):
        if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(owner) for owner in owners):
            raise ValueError(
                f"'{path}' is a link that leads out of the checkpoint (to '{os.path.realpath(path)}'): remove it, or "
                "put the file itself there."
            )


def _copy_others(checkpoint: Path, staging: Path) -> None:
    for entry in sorted(checkpoint.iterdir()):
        if entry.name in _LEFT_OUT or entry.name.startswith("rng_state"):
            continue
        _check_links(checkpoint, entry)
        copy: Any = shutil.copytree if entry.is_dir() else shutil.copy2
        copy(entry, staging / entry.name)


def _write_adapters(reader: ShardReader, staging: Path) -> list[Path]:
    path = reader.directory / _ADAPTERS
    try:
        stored = json.loads(path.read_text())
        names = {str(adapter): dict(keys) for adapter, keys in stored["names"].items()}
        layouts = {name: AdapterLayout(factor, int(count)) for name, (factor, count) in stored["layouts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' cannot be read ({type(error).__name__}: {error}).") from error
    written = []
    for adapter, keys in names.items():
        folder = staging if adapter == "default" else staging / adapter
        if Path(adapter).name != adapter or not (folder / "adapter_config.json").is_file():
            raise ValueError(f"'{path}' names the adapter '{adapter}', which has no adapter_config.json beside it.")
        tensors: dict[str, Tensor] = {key: reader.lazy(name) for key, name in keys.items()}
        for key, name in keys.items():
            if name in layouts:
                tensors[key] = layouts[name].to_plain(tensors[key])
        written.append(folder / ADAPTER_SAFE_WEIGHTS_NAME)
        write_tensors(written[-1], tensors)
    return written


def _write_model(
    reader: ShardReader, checkpoint: Path, staging: Path, classes: Sequence[type[PreTrainedModel]], max_bytes: int
) -> list[Path]:
    model = _build(checkpoint, classes)
    reader.check_names(set(weights_state(model)), f"the {type(model).__name__} of its config.json")
    return _write_plain(model, {name: reader.lazy(name) for name in reader.shapes}, staging, max_bytes)


def _build(checkpoint: Path, classes: Sequence[type[PreTrainedModel]]) -> PreTrainedModel:
    """The model of a folder's config.json, on meta."""
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)  # nor ask whether to
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            f"The config.json of '{checkpoint}' is not a config of transformers ({str(error).splitlines()[0]}), and "
            "code from a checkpoint is not run: register its class with AutoConfig, and pass the model's class in "
            "`classes`."
        ) from error
    kind = _model_class(config, classes)
    with torch.device("meta"):
        return kind(config)


def _write_foreign(
    files: list[Path], checkpoint: Path, staging: Path, classes: Sequence[type[PreTrainedModel]], max_bytes: int
) -> list[Path]:
    """Of torch files that hold a model's state dict, in which a tied parameter comes once or under all its names."""
    if not (checkpoint / CONFIG_NAME).is_file():
        raise ValueError(
            f"'{checkpoint}' has no {CONFIG_NAME}, without which '{files[0].name}' is of an unknown model: copy the "
            "model's config.json and tokenizer into it."
        )
    model = _build(checkpoint, classes)
    found = {name: tensor for path in files for name, tensor in open_torch(path).items()}
    wanted, state, first = weights_state(model), model.state_dict(), first_names(model)
    tensors = {first.get(name, name): tensor for name, tensor in found.items()}
    for verb, names in (("lacks", wanted.keys() - tensors.keys()), ("has", found.keys() - state.keys())):
        if names:
            raise ValueError(
                f"'{files[0]}' {verb} '{min(names)}' ({len(names)} such), unlike the state dict of the "
                f"{type(model).__name__} of its config.json: it is of another model, or of one with adapters."
            )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"'{files[0]}': '{name}' has shape {tuple(tensor.shape)}, and in the {type(model).__name__} of its "
                f"config.json {tuple(state[name].shape)}: it is of another model."
            )
    for entry in checkpoint.iterdir():
        if entry.is_file() and entry.suffix in _KEPT and entry.name not in (*_LEFT_OUT, WEIGHTS_INDEX_NAME):
            _check_links(checkpoint, entry)
            shutil.copy2(entry, staging / entry.name)
    return _write_plain(model, tensors, staging, max_bytes)


def _write_plain(model: PreTrainedModel, tensors: dict[str, Tensor], staging: Path, max_bytes: int) -> list[Path]:
    tensors = hf_weights.to_files(model, tensors)
    groups = _split(tensors, max_bytes)
    if len(groups) == 1:
        write_tensors(staging / SAFE_WEIGHTS_NAME, tensors)
        return [staging / SAFE_WEIGHTS_NAME]
    written, weight_map = [], {}
    for number, names in enumerate(groups, 1):
        name = SAFE_WEIGHTS_NAME.replace(".safetensors", f"-{number:05d}-of-{len(groups):05d}.safetensors")
        write_tensors(staging / name, {key: tensors[key] for key in names})
        weight_map.update(dict.fromkeys(names, name))
        written.append(staging / name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (staging / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _model_class(config: Any, classes: Sequence[type[PreTrainedModel]]) -> type[PreTrainedModel]:
    """By the name in the config, among transformers' own classes and `classes`: a checkpoint names no other code."""
    name = (config.architectures or [""])[0]
    found = next((kind for kind in classes if kind.__name__ == name), getattr(transformers, name or "_", None))
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise UnsupportedError(
            f"The config.json of the checkpoint names '{name}', which is no model of transformers: resume from it "
            "with `sharded_weights=False`, which writes plain weights."
        )
    return found


def _split(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in files of at most so many bytes, a larger tensor alone."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    return groups
