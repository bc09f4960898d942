"""What a resumed run needs beside the weights in their plain format: state that stays sharded on disk (torch DCP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from hf_veomni.checkpoint.agree import together
from hf_veomni.errors import public_kind

# Names instead of positions: another plan may group or order the parameters differently.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    return optimizer if inner is None else unwrap_optimizer(inner)


def _is_complete(directory: Path) -> bool:
    return (directory / ".metadata").is_file()


def _require(directory: Path) -> None:
    if not _is_complete(directory):
        raise ValueError(
            f"'{directory}' is missing or incomplete (no .metadata in it): the checkpoint cannot be resumed from. Use "
            "an earlier one, or load its weights alone with from_pretrained."
        )


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """DCP raises on every rank by itself, but a BaseException of all ranks' tracebacks: name the first cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise public_kind(cause)(f"{what} failed on rank {rank}: {type(cause).__name__}: {cause}") from cause


def _write(values: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    with _readable_errors(f"Writing '{directory}'"):
        state_dict_saver.save(values, checkpoint_id=directory, no_dist=not torch.distributed.is_initialized())


def _read(values: dict[str, Any], directory: str | os.PathLike[str]) -> None:
    """In place: the values keep their storage."""
    with _readable_errors(f"Reading '{directory}'"):
        state_dict_loader.load(values, checkpoint_id=directory, no_dist=not torch.distributed.is_initialized())


@contextmanager
def _groups_with_parameters(optimizer: Optimizer) -> Iterator[None]:
    """Hide empty parameter groups (Trainer's "no decay" under LoRA): torch 2.13 fails to name a group without any."""
    empty = [(place, group) for place, group in enumerate(optimizer.param_groups) if not group["params"]]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    try:
        yield
    finally:
        for place, group in empty:  # back in place: schedulers count groups
            optimizer.param_groups.insert(place, group)


def _get_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """By name. torch fills an empty state by a step of size 0, which optimizers with modes take in training alone."""
    train: Any = getattr(optimizer, "train", None)
    if callable(train) and not optimizer.state:
        train()
    return get_optimizer_state_dict(model, optimizer, options=_BY_NAME)


def _set_groups(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Options of the parameter groups alone, for an optimizer that keeps nothing else (SGD without momentum)."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        prefix = f"param_groups.{names[id(group['params'][0])]}."
        group.update({name: state[prefix + name] for name in group if prefix + name in state})


def save_optimizer(model: nn.Module, optimizer: Any, directory: str | os.PathLike[str]) -> None:
    """Write the optimizer's state; each rank writes what it owns, by parameter name. Every rank must call it.

    Collectives: DCP's planning gathers over all ranks.

    Raises:
        OSError: a rank cannot write; on every rank.
    """
    inner = unwrap_optimizer(optimizer)
    with _groups_with_parameters(inner):
        state = _get_state(model, inner)
    _write({"optimizer": state}, directory)


def load_optimizer(model: nn.Module, optimizer: Any, directory: str | os.PathLike[str]) -> None:
    """Read what `save_optimizer` wrote, under the same plan or another. Every rank must call it.

    Collectives: DCP's planning gathers over all ranks.

    Raises:
        ValueError: nothing complete there; on every rank.
    """
    with together(f"Reading the optimizer state '{directory}'"):
        _require(Path(directory))
    inner = unwrap_optimizer(optimizer)
    with _groups_with_parameters(inner):
        state = _get_state(model, inner)
        _read({"optimizer": state}, directory)
        if any(inner.state.values()):
            set_optimizer_state_dict(model, inner, state, options=_BY_NAME)
        else:
            _set_groups(model, inner, state)


def load_stock_optimizer(model: nn.Module, optimizer: Any, path: str | os.PathLike[str]) -> None:
    """Read the `optimizer.pt` of a one-process run into an optimizer over the same, possibly sharded, parameters.

    That file knows parameters by position; the groups of this optimizer name them.

    Raises:
        ValueError: other groups than this optimizer's; on every rank.
    """
    inner = unwrap_optimizer(optimizer)
    state: dict[str, Any] = {}
    with together(f"Reading the optimizer state '{path}'"):
        state = _named_state(model, inner, torch.load(path, map_location="cpu", weights_only=True), path)
    with _groups_with_parameters(inner):
        _get_state(model, inner)
        if any(inner.state.values()):
            set_optimizer_state_dict(model, inner, state, options=StateDictOptions(full_state_dict=True))
            return
        for group, stored in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})


def _named_state(model: nn.Module, optimizer: Optimizer, stored: dict[str, Any], path: Any) -> dict[str, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    there = [group["params"] for group in stored["param_groups"]]
    if [len(group) for group in here] != [len(group) for group in there]:
        raise ValueError(
            f"'{path}' has parameter groups of {[len(g) for g in there]} tensors, this optimizer of "
            f"{[len(g) for g in here]}: it was written by a run with other trainable parameters or weight decay."
        )
    by_position = {p: n for ns, ps in zip(here, there, strict=True) for n, p in zip(ns, ps, strict=True)}
    groups = [{**group, "params": ns} for group, ns in zip(stored["param_groups"], here, strict=True) if ns]
    return {"state": {by_position[p]: value for p, value in stored["state"].items()}, "param_groups": groups}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: everything, or a `PeftModel`'s trainable parameters (its base has its own file)."""
    state = model.state_dict()
    if not isinstance(model, PeftModel):
        return state
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trainable}


def save_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the weights, each rank what it owns. Every rank must call it. See `save_optimizer`."""
    _write({"model": _weights(model)}, directory)


@torch.no_grad()
def load_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Read what `save_weights` wrote, under the same plan or another. Every rank must call it.

    Raises:
        ValueError: nothing complete there; on every rank.
    """
    with together(f"Reading the weights '{directory}'"):
        _require(Path(directory))
    _read({"model": _weights(model)}, directory)
