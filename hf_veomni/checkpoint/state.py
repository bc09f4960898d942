"""What a resumed run needs beside the weights in their plain format: state that stays sharded on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from hf_veomni.checkpoint.files import naming_damage
from hf_veomni.checkpoint.low_bit import is_low_bit
from hf_veomni.checkpoint.plain import adapter_keys, first_names
from hf_veomni.checkpoint.shards import read_state, write_state
from hf_veomni.checkpoint.stages import global_names, join_groups, share_state, writes_whole
from hf_veomni.comm.agree import together
from hf_veomni.errors import UnsupportedError

# Names instead of positions: another plan may group or order the parameters differently.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers."""
    inner = getattr(optimizer, "optimizer", None)
    return optimizer if inner is None else unwrap_optimizer(inner)


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
    if callable(train) and not any(optimizer.state.values()):
        train()
        optimizer.state.clear()  # looking a parameter up there has made an empty entry, which torch takes for a state
    return get_optimizer_state_dict(model, optimizer, options=_BY_NAME)


def _set_groups(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Options of the parameter groups alone, for an optimizer that keeps nothing else (SGD without momentum)."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        prefix = f"param_groups.{names[id(group['params'][0])]}."
        group.update({name: state[prefix + name] for name in group if prefix + name in state})


def optimizer_state(model: nn.Module, optimizer: object) -> dict[str, Any]:
    """The optimizer's state by parameter name: sharded tensors, and the options of the parameter groups.

    Of pipeline stages it is what this rank writes; collective there: see `share_state`.
    """
    inner = unwrap_optimizer(optimizer)
    with _groups_with_parameters(inner):
        return share_state(_get_state(model, inner), model, write=True)


def save_optimizer(model: nn.Module, optimizer: object, directory: str | os.PathLike[str]) -> None:
    """Write the optimizer's state; each rank writes what it owns, by parameter name. Every rank must call it.

    Collectives and errors: see `write_state`.
    """
    write_state(optimizer_state(model, optimizer), directory, writes_whole(model))


def load_optimizer(model: nn.Module, optimizer: object, directory: str | os.PathLike[str]) -> None:
    """Read what `save_optimizer` wrote, under the same plan or another. Every rank must call it.

    Collective: one small all-gather, and what `share_state` has.

    Raises:
        ValueError: nothing complete there, or of other parameters; on every rank.
    """
    inner = unwrap_optimizer(optimizer)
    with _groups_with_parameters(inner):
        state = _get_state(model, inner)
        whole = share_state(state, model)
        with together(f"Reading the optimizer state '{directory}'"):
            read_state(whole, directory, "this optimizer")
        state = {key: whole[name] for key, name in global_names(state, model).items()}
        if any(inner.state.values()):
            set_optimizer_state_dict(model, inner, state, options=_BY_NAME)
        else:
            _set_groups(model, inner, state)


def fit_groups(scheduler: dict[str, Any], count: int) -> dict[str, Any]:
    """A scheduler's state for another number of parameter groups: Trainer makes one for each mesh of the plan.

    Raises:
        UnsupportedError: the groups had different schedules, so it is unknown which new group goes on with which.
    """
    fitted = dict(scheduler)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = scheduler.get(name)
        if isinstance(values, list) and len(values) != count:
            if any(value != values[0] for value in values):
                raise UnsupportedError(
                    f"The checkpoint's scheduler has {len(values)} parameter groups with different `{name}` ({values})"
                    f", this plan makes {count}: resume under the plan that wrote it."
                )
            fitted[name] = values[:1] * count
    return fitted


def load_stock_optimizer(model: nn.Module, optimizer: object, path: str | os.PathLike[str]) -> None:
    """Read the `optimizer.pt` of a one-process run into an optimizer over the same, possibly sharded, parameters.

    That file knows parameters by position; the groups of this optimizer, and of those of other stages, name them.

    Collective: one small all-gather, and what `join_groups` has.

    Raises:
        ValueError: other groups than this optimizer's, or on stages another order than the model's; on every rank.
        UnsupportedError: moments in few bits.
    """
    inner = unwrap_optimizer(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    own = global_names(names.values(), model)
    groups = join_groups([[own[names[id(p)]] for p in group["params"]] for group in inner.param_groups], model)
    state: dict[str, Any] = {}
    with together(f"Reading the optimizer state '{path}'"):
        with naming_damage(path):
            stored = torch.load(path, map_location="cpu", weights_only=True)
        if any(is_low_bit(value) for values in stored["state"].values() for value in values.values()):
            raise UnsupportedError(
                f"'{path}' has moments in few bits, coded in blocks of one process: go on with the stock Trainer, or "
                "begin a new run from the weights beside it."
            )
        state = _named_state(groups, {name: key for key, name in own.items()}, stored, path)
    with _groups_with_parameters(inner):
        _get_state(model, inner)
        if any(inner.state.values()):
            set_optimizer_state_dict(model, inner, state, options=StateDictOptions(full_state_dict=True))
            return
        for group, stored in zip(inner.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})


def _named_state(here: list[list[str]], own: dict[str, str], stored: dict[str, Any], path: object) -> dict[str, Any]:
    """The stored state by this model's names.

    Args:
        here: of the parameters in each group, of all stages.
        own: such a name -> the one on this stage, for what it has.
    """
    there = [group["params"] for group in stored["param_groups"]]
    if [len(group) for group in here] != [len(group) for group in there]:
        raise ValueError(
            f"'{path}' has parameter groups of {[len(g) for g in there]} tensors, this optimizer of "
            f"{[len(g) for g in here]}: it was written by a run with other trainable parameters or weight decay."
        )
    by_position = {p: n for ns, ps in zip(here, there, strict=True) for n, p in zip(ns, ps, strict=True)}
    mine = [[own[name] for name in names if name in own] for names in here]
    groups = [{**group, "params": ns} for group, ns in zip(stored["param_groups"], mine, strict=True) if ns]
    values = {own[name]: value for p, value in stored["state"].items() if (name := by_position[p]) in own}
    return {"state": values, "param_groups": groups}


def weights_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: everything, or of a `PeftModel` its adapters and what else is trained (its base has its
    own file). A tied parameter comes once, under the first of its names. Of a pipeline stage it is its own part."""
    first, whole = first_names(model), model.state_dict()
    state = {name: tensor for name, tensor in whole.items() if first.get(name, name) == name}
    if not isinstance(model, PeftModel):
        return state
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    for adapter in model.peft_config:
        wanted.update(first.get(name, name) for name in adapter_keys(model, adapter, whole).values())
    return {name: tensor for name, tensor in state.items() if name in wanted}


def save_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the weights, each rank what it owns. Every rank must call it. See `save_optimizer`."""
    write_state(share_state(weights_state(model), model, write=True), directory, writes_whole(model))


def load_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Read what `save_weights` wrote, under the same plan or another. Every rank must call it.

    Collective: one small all-gather, and what `share_state` has.

    Raises:
        ValueError: nothing complete there, or of another model; on every rank.
    """
    state = share_state(weights_state(model), model)
    with together(f"Reading the weights '{directory}'"):
        read_state(state, directory, f"this {type(model).__name__}")
