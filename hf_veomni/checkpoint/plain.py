"""Sharded model <-> the plain formats: safetensors that stock transformers and stock PEFT open."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from hf_veomni import hf
from hf_veomni.checkpoint.files import naming_damage, staged
from hf_veomni.checkpoint.foreign import find_torch_files
from hf_veomni.checkpoint.load import read_converted
from hf_veomni.checkpoint.manifest import names_within
from hf_veomni.checkpoint.stages import global_names, join_facts, join_stages, leads_stage, share_state, stage_of
from hf_veomni.comm.agree import together
from hf_veomni.expert import AdapterLayout, find_layouts


def _stock_class(model: nn.Module) -> type:
    """The class that a user knows: `fully_shard` puts a generated one in front."""
    return next(owner for owner in type(model).__mro__ if not owner.__name__.startswith("FSDP"))


def adapter_keys(model: PeftModel, name: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key in PEFT's file -> key in the model's state dict, for the adapter `name`."""
    names = {id(tensor): key for key, tensor in state.items()}
    saved = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=name)
    return {key: names[id(tensor)] for key, tensor in saved.items()}


def first_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> the first of its names: itself, unless it is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def adapter_names(model: PeftModel) -> dict[str, dict[str, str]]:
    """Of each adapter: key in PEFT's file -> key in the state dict of the whole model.

    Collective with pipeline stages, which have some of them each: `join_facts`.
    """
    state, first = model.state_dict(), first_names(model)
    known = global_names(state, model)
    found = [
        {key: known[first.get(name, name)] for key, name in adapter_keys(model, adapter, state).items()}
        for adapter in model.peft_config
    ]
    return dict(zip(model.peft_config, join_facts(found, model), strict=True))


def _complete_adapters(names: dict[str, dict[str, str]], directory: Path, state: Mapping[str, Tensor]) -> None:
    """PEFT looks for what it saves (`modules_to_save`) in its model, and rank 0 has the first stage's alone."""
    for adapter, keys in names.items():
        path = (directory if adapter == "default" else directory / adapter) / ADAPTER_SAFE_WEIGHTS_NAME
        if path.is_file() and (missing := keys.keys() - (saved := load_file(path)).keys()):
            saved |= {key: state[keys[key]].contiguous() for key in missing}
            save_file(saved, path, metadata={"format": "pt"})


def _full(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered over its outer axes first: FSDP sharded what EP had left."""
    if not isinstance(tensor, DTensor):
        return tensor
    for axis in range(tensor.device_mesh.ndim - 1):
        placements = [Replicate() if place <= axis else p for place, p in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=placements)
    return tensor.full_tensor()


def gather_full_state(model: nn.Module, *, keep: bool, names: set[str] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers in full on the CPU, one at a time, so that no rank holds a second full model.

    Args:
        keep: whether this rank wants them; the others take part and drop each tensor at once.
        names: keys of the state dict; None takes all.

    Returns:
        Global tensors by name on ranks that keep them, an empty dict elsewhere. Tied parameters share one tensor.

    Collectives: one all-gather per sharded tensor over the mesh it lives on, and what `join_stages` has. No gradient.
    """
    stage = stage_of(model)
    wanted, keep = keep, keep or (stage is not None and leads_stage(stage))
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    layouts = find_layouts(model)
    full: dict[str, Tensor] = {}
    seen: dict[int, Tensor | None] = {}
    for name, tensor in model.state_dict().items():
        if names is not None and name not in names:
            continue
        key = parameters.get(name, id(tensor))
        if key not in seen:
            gathered = _full(tensor)
            if name in layouts:
                gathered = layouts[name].to_plain(gathered).contiguous()
            seen[key] = gathered.detach().cpu() if keep else None
        value = seen[key]
        if value is not None:
            full[name] = value
    return full if stage is None else join_stages(full, model, stage, wanted)


def gather_plain_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """What a plain checkpoint of `model` holds: all of it, or the adapters' tensors of a `PeftModel`.

    Collectives: see `gather_full_state`.
    """
    if not isinstance(model, PeftModel):
        return gather_full_state(model, keep=keep)
    state = model.state_dict()
    names = {key for name in model.peft_config for key in adapter_keys(model, name, state).values()}
    return gather_full_state(model, keep=keep, names=names)


def restore_class_name(directory: Path, base: PreTrainedModel) -> None:
    """PEFT notes the base class for AutoPeftModel: the stock one, not FSDP2's generated subclass."""
    for path in directory.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        if isinstance(config.get("auto_mapping"), dict):
            stock = _stock_class(base)
            config["auto_mapping"] = {"base_model_class": stock.__name__, "parent_library": stock.__module__}
            path.write_text(json.dumps(config, indent=2, sort_keys=True))


def save_plain(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    write: bool,
    extras: Callable[[Path], Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    save: Callable[[Path, dict[str, Tensor]], Any] | None = None,
) -> None:
    """Save so that `from_pretrained` of stock transformers (or PEFT, for a `PeftModel`: adapters only) opens it.

    Every rank must call it. The directory appears complete, or stays as it was if anything fails.

    Args:
        write: whether this rank writes; true on rank 0 alone.
        extras: called with the directory to add files to it (tokenizer, arguments).
        state: full tensors that were gathered already.
        save: called with the directory and the full tensors in place of `save_pretrained`.

    Collectives: see `gather_full_state`, then one small all-gather, and with stages that of `adapter_names`.

    Raises:
        OSError: no space, no permission; on every rank.
        ValueError: `directory` is a file; on every rank.
    """
    if state is None:
        state = gather_plain_state(model, keep=write)
    names = adapter_names(model) if isinstance(model, PeftModel) and stage_of(model) is not None else {}
    with together(f"Saving the model to '{directory}'"):
        if write:
            with staged(directory) as staging:
                saver: Any = model
                if save is None:
                    saver.save_pretrained(staging, state_dict=dict(state))
                else:
                    save(staging, dict(state))
                if isinstance(model, PeftModel):
                    _complete_adapters(names, staging, state)
                    restore_class_name(staging, hf.base_model(model))
                if extras is not None:
                    extras(staging)


def _weight_files(directory: Path) -> dict[str, Path]:
    """Key -> file that holds it, for a plain model directory."""
    index, single = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
    if single.is_file():
        with naming_damage(single), safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single)
    if not index.is_file():
        if found := find_torch_files(directory):
            raise ValueError(
                f"'{directory}' holds '{found[0].name}', and a checkpoint's weights must be safetensors: "
                f"`hf-veomni convert {directory} OUT` writes them."
            )
        raise ValueError(
            f"'{directory}' holds no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} there. Name a "
            "directory that `save_model` or a checkpoint wrote."
        )
    weight_map = json.loads(index.read_text())["weight_map"]
    if outside := sorted(name for name in weight_map.values() if not names_within(directory / name, directory)):
        raise ValueError(f"'{index}' names a file outside of its folder ('{outside[0]}'), which is not read.")
    missing = sorted({name for name in weight_map.values() if not (directory / name).is_file()})
    if missing:
        raise ValueError(f"'{directory}' is incomplete: {', '.join(missing)} of {index.name} do not exist.")
    return {key: directory / name for key, name in weight_map.items()}


# What an adapter's configuration may say differently when a run goes on: where it came from, how it began, dropout.
_FREE = re.compile(
    "auto_mapping|base_model_name_or_path|revision|inference_mode|task_type|peft_version|init_.*|.*dropout"
)


def _as_stored(value: Any) -> Any:
    """As json has it; names in any order, each once: PEFT adds to the user's list whenever a model is made with it."""
    value = json.loads(
        json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other))
    )
    return sorted(set(value)) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


def check_adapters(model: nn.Module, directory: Path) -> None:
    """Refuse adapters that mean something else than those of a checkpoint: tensors of the same names and shapes would
    be read, and scaled in another way. Not a collective.

    Raises:
        ValueError: a field of an adapter's configuration differs; it is named with both values.
    """
    for name, config in model.peft_config.items() if isinstance(model, PeftModel) else ():
        path = (directory if name == "default" else directory / name) / "adapter_config.json"
        if not path.is_file():
            continue  # the weights are looked for, too
        try:
            stored = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{path}' cannot be read ({error}): it is cut off or damaged.") from error
        for field, value in config.to_dict().items():
            here, there = _as_stored(value), _as_stored(stored.get(field, value))
            if here != there and not _FREE.fullmatch(field):
                raise ValueError(
                    f"The adapter '{name}' has `{field}` {here!r}, in the checkpoint '{directory}' it has {there!r}: "
                    "make the adapters as the run that wrote it did, or begin a new run from its weights."
                )


def _adapter_files(model: PeftModel, directory: Path, state: Mapping[str, Tensor]) -> dict[str, tuple[Path, str]]:
    found: dict[str, tuple[Path, str]] = {}
    for name in model.peft_config:
        path = (directory if name == "default" else directory / name) / ADAPTER_SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(f"'{path}' does not exist: '{directory}' holds no checkpoint of the adapter '{name}'.")
        found.update({key: (path, saved) for saved, key in adapter_keys(model, name, state).items()})
    return found


def _copy_slice(target: Tensor, handle: Any, key: str, path: Path, layout: AdapterLayout | None) -> None:
    """Read this rank's part of one tensor from disk into `target`, a DTensor or a plain tensor."""
    part = layout.to_stack(handle.get_tensor(key)) if layout is not None else handle.get_slice(key)
    shape = tuple(part.shape if isinstance(part, Tensor) else part.get_shape())
    if shape != tuple(target.shape):
        raise ValueError(
            f"'{path}': '{key}' has shape {shape}, but the model's has {tuple(target.shape)}: the checkpoint is of "
            "another model."
        )
    if not target.dim():
        target.copy_(handle.get_tensor(key))
    elif isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        ranges = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        local = target.to_local()
        if local.numel():
            local.copy_(part[ranges])
    else:
        target.copy_(part[:])


def _pairs(files: Mapping[str, tuple[Path, str]]) -> Iterator[tuple[str, Any, str, Path]]:
    """Key in the model's state dict, the open file that has its tensor, the key there, and the file's path."""
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for key, (path, saved) in files.items():
            if path not in handles:
                with naming_damage(path):
                    handles[path] = stack.enter_context(safe_open(path, framework="pt"))
            if saved not in handles[path].keys():
                raise ValueError(f"'{path}' has no tensor '{saved}': it is a checkpoint of another model or adapter.")
            yield key, handles[path], saved, path


@torch.no_grad()
def load_plain(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Load a plain checkpoint into a model whose parameters may be sharded; the inverse of `save_plain`.

    Each rank reads the part of each tensor that it owns, also where the family stores its weights in another
    arrangement than it computes with (stacked experts).

    Collectives: one small all-gather, and what `share_state` has.

    Raises:
        ValueError: no checkpoint there, or one of another model; on every rank.
    """
    directory = Path(directory)
    adapted = isinstance(model, PeftModel)
    state = model.state_dict() if adapted else share_state(model.state_dict(), model)
    files: dict[str, tuple[Path, str]] = {}
    converted = False
    with together(f"Reading the checkpoint '{directory}'"):
        if adapted:
            files = _adapter_files(model, directory, state)
        else:
            weights = _weight_files(directory)
            files = {key: (weights[key], key) for key in state if key in weights}
            converted = bool(_untied(model, set(state) - set(files)))
            if not converted:
                _check_unexpected(model, weights.keys() - state.keys(), directory)
        if not converted:
            layouts = find_layouts(model)
            own = {name: place for name, place in files.items() if not state[name].is_meta}
            for name, handle, key, path in _pairs(own):
                _copy_slice(state[name], handle, key, path, layouts.get(name))
        else:
            read_converted(state, _stock_class(model), directory)


def _check_unexpected(model: nn.Module, names: set[str], directory: Path) -> None:
    """A deeper model's files would fill a shallower one without a word."""
    known = hf.base_model(model)._keys_to_ignore_on_load_unexpected or ()
    found = sorted(name for name in names if not any(re.search(pattern, name) for pattern in known))
    if found:
        raise ValueError(
            f"'{directory}' has '{found[0]}' ({len(found)} such), which this {_stock_class(model).__name__} does not "
            "have: the checkpoint is of another model."
        )


def _untied(model: nn.Module, missing: set[str]) -> set[str]:
    """Those of `missing` that are not another name of a parameter that is there."""
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    present = {ident for name, ident in parameters.items() if name not in missing}
    return {name for name in missing if parameters.get(name) not in present}
