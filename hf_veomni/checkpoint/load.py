"""Fill a model that was built on the meta device: each rank reads its own parts of the checkpoint's files.

    plan_weights          before the model is touched: names, shapes and conversions of the files, no values
    retain_weights        everything on meta, in the dtypes of the values
    (experts sharded over EP, parameters sharded, all on meta)
    materialize_weights   memory for this rank's parts, and the parts read from the files

transformers' loader runs on a copy of the model as it was built, with tensors that are not read yet (`lazy`), so that
renaming, conversion and what is missing are decided by its own code from global shapes, as on one rank.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.checkpoint.foreign import find_torch_files, open_torch
from hf_veomni.checkpoint.lazy import LazyTensor, open_lazy
from hf_veomni.comm.agree import together
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_layouts
from hf_veomni.hf import weights as hf_weights

Checkpoint = str | os.PathLike[str]


@dataclass
class PendingWeights:
    """What a model on meta is to be filled with.

    Attributes:
        checkpoint: folder or Hub id.
        values: name in the model -> global tensor, lazy where it is in the files.
        adapters: layers of a copy of the model, for PEFT to initialise: (layer, adapter, kind of initialisation).
        initialised: name in the model -> tensor of such a layer.
        plain: the copy of the transformers model that the loader has filled.
        files: keeps the files open.
    """

    checkpoint: Checkpoint
    values: dict[str, Tensor]
    adapters: list[tuple[Any, str, Any]]
    initialised: dict[str, Tensor]
    plain: PreTrainedModel
    files: ExitStack = field(default_factory=ExitStack)


def _tensors(model: nn.Module, duplicates: bool = True) -> Iterator[tuple[str, Tensor]]:
    return chain(
        model.named_parameters(remove_duplicate=not duplicates), model.named_buffers(remove_duplicate=not duplicates)
    )


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def _names(found: list[str], limit: int = 4) -> str:
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(f"'{name}'" for name in found[:limit]) + more


def _check_report(report: hf_weights.LoadReport, model: nn.Module, checkpoint: Checkpoint) -> None:
    problems = []
    if report.missing:
        problems.append(f"it lacks {_names(report.missing)}")
    if report.unexpected:
        problems.append(f"the model has no {_names(report.unexpected)}")
    for name, found, wanted in report.mismatched[:2]:
        problems.append(f"'{name}' has shape {tuple(found)} there and {tuple(wanted)} in the model")
    for name, why in list(report.errors.items())[:2]:
        problems.append(f"'{name}' cannot be converted ({why})")
    if report.untied:
        problems.append(f"{_names(report.untied)} is tied in the model and has values of its own there")
    if problems:
        raise ValueError(
            f"`checkpoint` ('{checkpoint}') is not one of this {type(model).__name__}: {'; '.join(problems)}. Build "
            "the model from the checkpoint's own config and class, or load it with from_pretrained first."
        )


def _plan_adapters(model: PeftModel, twins: dict[int, str]) -> tuple[list[tuple[Any, str, Any]], dict[str, Tensor]]:
    """The adapters of a copy that are on meta, with memory on the CPU: what to initialise, and tensors by name."""
    layers: list[tuple[Any, str, Any]] = []
    named: dict[str, Tensor] = {}
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        fresh: dict[str, Tensor] = {}
        for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            for name, tensor in list(part.named_parameters()):
                if tensor.is_meta:
                    fresh[twins[id(tensor)]] = nn.Parameter(torch.empty_like(tensor, device="cpu"))
                    _replace(part, name, fresh[twins[id(tensor)]])
        for adapter in [*layer.lora_A, *layer.lora_embedding_A] if fresh else ():
            kind = getattr(model.peft_config[adapter], "init_lora_weights", None)
            if not isinstance(kind, bool) and kind != "gaussian":
                raise UnsupportedError(
                    f"`init_lora_weights` ({kind!r}) of the adapter '{adapter}' looks at weights, which are on the "
                    "meta device: use True, False or 'gaussian', or load the base with from_pretrained first."
                )
            layers.append((layer, adapter, kind))
        named.update(fresh)
    return layers, named


def check_parameters(model: nn.Module, checkpoint: Checkpoint | None) -> PendingWeights | None:
    """What to fill a model on meta with; None for one that has its weights.

    Raises:
        ValueError: weights and a checkpoint, or neither.
        UnsupportedError: parameters that are shards already.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UnsupportedError(
                f"Parameter '{name}' is already a DTensor: `prepare_omni` shards the model itself. Load it without "
                "distributed_config, tp_plan or a second `prepare_omni`."
            )
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is None and checkpoint is not None:
        raise ValueError(
            f"`checkpoint` ('{checkpoint}') is for models on the meta device, and this {type(model).__name__} has its "
            "weights already: leave it out, or build the model under `torch.device('meta')`."
        )
    if meta is not None and checkpoint is None:
        raise ValueError(
            f"Parameter '{meta}' is on the meta device: name the weights with "
            "`prepare_omni(model, plan, checkpoint=...)`, of which each rank reads its part, or load them before with "
            "from_pretrained."
        )
    return None if checkpoint is None else plan_weights(model, checkpoint)


def plan_weights(model: nn.Module, checkpoint: Checkpoint) -> PendingWeights:
    """Find out how a checkpoint fills a model on meta; reads the headers of its files only. Not a collective.

    Call it while the model is as it was built.

    Args:
        model: a transformers model with all parameters on meta, or a `PeftModel` on one.

    Raises:
        ValueError: a checkpoint that is not there, or that is of another model.
        UnsupportedError: what cannot be had on meta.
    """
    base = hf.base_model(model)
    if getattr(base.config, "quantization_config", None) is not None:
        raise UnsupportedError(
            f"{type(base).__name__}'s config has a `quantization_config`: weights on the meta device are read as they "
            "are. Remove it to load a plain checkpoint, or load the model with from_pretrained."
        )
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)
    twins: dict[int, str] = {}
    for name, tensor in _tensors(model):
        twins.setdefault(id(memo[id(tensor)]), name)
    adapters, initialised = _plan_adapters(twin, twins) if isinstance(twin, PeftModel) else ([], {})
    plain: PreTrainedModel = twin.unload() if isinstance(twin, PeftModel) else hf.base_model(twin)  # type: ignore[assignment, operator]
    names = {name: twins[id(tensor)] for name, tensor in _tensors(plain)}
    for name, parameter in plain.named_parameters():
        if not parameter.is_meta:
            raise UnsupportedError(
                f"Parameter '{names[name]}' has values and others are on the meta device: build the full model on "
                "meta, or load all of it with from_pretrained."
            )
    pending = PendingWeights(checkpoint, {}, adapters, initialised, plain)
    with ExitStack() as files:
        lazy = _open(checkpoint, files)
        _check_report(hf_weights.load_tensors(plain, lazy), base, checkpoint)
        if uncomputed := hf_weights.compute_buffers(plain):
            raise UnsupportedError(
                f"{_names(uncomputed)} of {type(base).__name__} is on the meta device, in no checkpoint, and the "
                "family has no rule to compute it: build the model with real buffers, or use from_pretrained."
            )
        pending.values = {names[name]: tensor for name, tensor in _tensors(plain)}
        for name, tensor in _tensors(model):  # a pipeline stage may have a tied parameter under its second name
            if (first := twins[id(memo[id(tensor)])]) in pending.values:
                pending.values[name] = pending.values[first]
        pending.files = files.pop_all()
    for name, tensor in _tensors(model, duplicates=False):
        if tensor.is_meta and name not in pending.values and name not in initialised:
            raise UnsupportedError(
                f"'{name}' is on the meta device, neither in the checkpoint of the base model nor a plain LoRA matrix "
                "(DoRA, `modules_to_save`): load the base with from_pretrained before PEFT adds it."
            )
    return pending


def _open(checkpoint: Checkpoint, files: ExitStack) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in find_torch_files(Path(checkpoint)):
        tensors.update(open_torch(file))
    if tensors:
        return tensors
    try:
        for path in hf_weights.find_weight_files(checkpoint):
            tensors.update(open_lazy(path, files))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"`checkpoint` ('{checkpoint}') cannot be opened: {error}. Name a folder or Hub id with safetensors files."
        ) from error
    return tensors


@torch.no_grad()
def retain_weights(model: nn.Module, pending: PendingWeights) -> None:
    """Put what has values already (adapters) on meta with the rest, and give all the dtypes of their values.

    Those dtypes are the ones that from_pretrained gives: families keep some tensors in fp32.
    """
    for name, tensor in list(_tensors(model, duplicates=False)):
        value = pending.values.get(name)
        if not tensor.is_meta:
            pending.values.setdefault(name, tensor)
            if isinstance(tensor, nn.Parameter):
                _replace(model, name, nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad))
        elif value is not None and value.dtype != tensor.dtype:
            tensor.data = tensor.data.to(value.dtype)


def _initialise_adapters(pending: PendingWeights) -> None:
    """PEFT's own initialisation, from the same seed on all ranks. Collective: a broadcast of the seed."""
    if not pending.adapters:
        return
    seed = [int(torch.randint(2**62, ()))]
    if dist.is_initialized():
        dist.broadcast_object_list(seed, src=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed[0])
        for layer, adapter, kind in pending.adapters:
            for part in (layer.lora_A, layer.lora_B):
                if adapter in part:
                    part[adapter].reset_parameters()  # what PEFT leaves with init_lora_weights=False
            layer.reset_lora_parameters(adapter, kind)


@torch.no_grad()
def materialize_weights(model: nn.Module, pending: PendingWeights, device: torch.device) -> None:
    """Give a model on meta its memory on `device` and read this rank's parts into it.

    Args:
        model: the model of `plan_weights`, its parameters on meta, sharded or not.

    Collectives: a broadcast of a seed for adapters, and one small all-gather.

    Raises:
        ValueError, OSError: a file that cannot be read; on every rank. The model is lost then.
    """
    _initialise_adapters(pending)
    with pending.files, together(f"Reading the checkpoint '{pending.checkpoint}'"):
        _allocate(model, device)
        layouts = find_layouts(model)
        for name, tensor in _tensors(model, duplicates=False):
            value = pending.initialised[name] if name in pending.initialised else pending.values[name]
            fill(tensor, layouts[name].to_stack(value) if name in layouts else value)
        hf_weights.copy_conversions(hf.base_model(model), pending.plain)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """`to_empty`, which would make two of a tied parameter."""
    first: dict[int, str] = {}
    tied = [(name, first[id(t)]) for name, t in _tensors(model) if first.setdefault(id(t), name) != name]
    model.to_empty(device=device)
    for name, source in tied:
        owner, _, leaf = source.rpartition(".")
        _replace(model, name, getattr(model.get_submodule(owner), leaf))


def fill(target: Tensor, value: Tensor) -> None:
    """Copy this rank's part of a full tensor into `target`, sharded or not."""
    box = tuple(slice(0, size) for size in target.shape)
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        box = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        target = target.to_local()
    if target.numel():
        target.copy_(value.read(box) if isinstance(value, LazyTensor) else value[box])


@torch.no_grad()
def read_converted(targets: Mapping[str, Tensor], kind: type[PreTrainedModel], directory: Checkpoint) -> None:
    """Read this rank's parts of a complete checkpoint into a transformers model that has its memory, sharded or not.

    Not a collective.

    Args:
        targets: the state dict of the model; what lies on the meta device is not read.
        kind: the model's stock class.

    Raises:
        ValueError: a checkpoint that is not there, is of another model, or lacks something.
    """
    with torch.device("meta"):
        plain = kind(kind.config_class.from_pretrained(directory))  # type: ignore[union-attr]
    values, first = plain.state_dict(keep_vars=True), dict[int, str]()
    # A pipeline stage knows a tied parameter by the first of its names alone.
    names = [name for name, tensor in values.items() if first.setdefault(id(tensor), name) == name or name in targets]
    if other := sorted(set(names) ^ targets.keys()):
        raise ValueError(
            f"The config in '{directory}' builds a model that differs from this {kind.__name__} in {_names(other)}: "
            "it is of another model."
        )
    for name in names:
        values[name].data = values[name].data.to(targets[name].dtype)
    with ExitStack() as files:
        report = hf_weights.load_tensors(plain, _open(directory, files))
        _check_report(replace(report, unexpected=[]), plain, directory)
        values = plain.state_dict(keep_vars=True)
        for name in names:
            if not targets[name].is_meta:
                fill(targets[name], values[name])
