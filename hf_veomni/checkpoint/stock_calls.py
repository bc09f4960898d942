"""What users call on any Hugging Face model, on one whose parameters are shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_veomni.checkpoint.load import fill
from hf_veomni.checkpoint.plain import gather_full_state, gather_plain_state, save_plain
from hf_veomni.comm.agree import meet
from hf_veomni.errors import UnsupportedError
from hf_veomni.expert import find_layouts

MEETING = timedelta(minutes=2)  # how long a rank waits for the others to call `save_pretrained` too

_REFUSED = {
    "resize_token_embeddings": "resize the embeddings before `prepare_omni`",
    "push_to_hub": "`save_pretrained(folder)` on every rank, then `huggingface_hub.upload_folder` on the main process",
    "no_sync": "accumulate with `accelerator.accumulate(model)`; `LocalSGD`, in which each rank trains a model of its "
    "own for some steps, is not available where all ranks hold one",
    "__deepcopy__": "`copy.deepcopy` and what copies a model by it (`AveragedModel`) need full parameters. Keep "
    "averages in shards, {name: p.detach().clone() for name, p in model.named_parameters()}, or prepare another model",
}
_MERGED = "save the adapter, and merge it into the plain model with PEFT"
_REFUSED_TUNER = {
    **dict.fromkeys(("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload"), _MERGED),
    "add_weighted_adapter": "combine adapters before `prepare_omni`, or save them and combine them in the plain model",
}


_turns = count()  # of all models: the ranks meet once for each call


class _Save:
    """`save_pretrained` of a sharded model: the full tensors are gathered, and rank 0 writes the plain format."""

    def __init__(self, model: nn.Module, stock: Callable[..., Any]) -> None:
        self.model, self.stock = model, stock

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """As stock, with the same arguments; stock itself where full tensors are given in `state_dict`.

        Collective without `state_dict`: every rank must call it. See `save_plain`, which it raises as.

        Raises:
            UnsupportedError: an option that cannot be combined with shards; ranks that did not call within `MEETING`.
        """
        options = _by_name(self.stock, args, kwargs)
        if options.get("state_dict") is not None:
            return self.stock(*args, **kwargs)
        for name in ("push_to_hub", "distributed_checkpoint"):
            if options.get(name):
                raise UnsupportedError(
                    f"`{name}` (True) is not available on a prepared model: {_REFUSED['push_to_hub']}."
                )
        meet("save_pretrained", next(_turns), MEETING)
        directory, writes = options.pop("save_directory"), dist.get_rank() == 0
        wanted = options.pop("is_main_process", True)
        options.pop("state_dict", None)
        # Options may ask for more than the adapters: embeddings that were resized.
        gather = gather_full_state if options else gather_plain_state
        state = gather(self.model, keep=writes)

        def save(folder: Path, tensors: dict[str, Tensor]) -> None:
            self.stock(folder, state_dict=tensors, **options)

        save_plain(self.model, directory, write=writes and bool(wanted), state=state, save=save)


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names, those of `**kwargs` among them."""
    signature = inspect.signature(function)
    found = dict(signature.bind(*args, **kwargs).arguments)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    return {**found, **found.pop(rest, {})}


class _Load:
    """`load_state_dict` of a sharded model: of full tensors each rank takes its part."""

    def __init__(self, model: nn.Module, stock: Callable[..., Any]) -> None:
        self.model, self.stock = model, stock

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As stock; of parameters that are shards, from tensors that are whole and the same on every rank.

        Not a collective. Raises UnsupportedError for `assign=True`, which would put full tensors in place of shards.
        """
        if assign:
            raise UnsupportedError(
                "`assign` (True) would put full tensors in place of this rank's shards: leave it out, so that the "
                "values are copied."
            )
        own, layouts = self.model.state_dict(), find_layouts(self.model)
        given = dict(state_dict)
        for name, value in given.items():
            target = own.get(name)
            if not isinstance(target, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
                continue
            value = value.detach()  # of `state_dict(keep_vars=True)`, or `named_parameters()`
            whole = layouts[name].to_stack(value) if name in layouts else value
            if whole.shape == target.shape:  # of others the stock method tells
                given[name] = shard = torch.empty_like(target)
                fill(shard, whole)
        return self.stock(given, strict=strict)


def _refuse(name: str, way_out: str, *args: object, **kwargs: object) -> NoReturn:
    raise UnsupportedError(
        f"`{name}` is not available on a prepared model, of which each rank holds shards: {way_out}."
    )


def attach_stock_calls(model: nn.Module, base: nn.Module, world_size: int) -> Callable[[], None]:
    """Let `save_pretrained` write and `load_state_dict` read full models, and refuse by name what works on them.

    Returns:
        A function that takes all of it off again.
    """
    owners: dict[nn.Module, dict[str, Any]] = {}
    if world_size > 1:
        for owner in dict.fromkeys((model, base)):
            stock: Any = owner
            owners[owner] = {name: partial(_refuse, name, way_out) for name, way_out in _REFUSED.items()}
            owners[owner]["load_state_dict"] = _Load(owner, stock.load_state_dict)
            owners[owner]["save_pretrained"] = _Save(owner, stock.save_pretrained)
        if isinstance(model, PeftModel):
            owners[model.base_model] = {name: partial(_refuse, name, why) for name, why in _REFUSED_TUNER.items()}
    for owner, methods in owners.items():
        vars(owner).update(methods)
    return partial(_detach, owners)


def _detach(owners: dict[nn.Module, dict[str, Any]]) -> None:
    for owner, methods in owners.items():
        for name, method in methods.items():
            if vars(owner).get(name) is method:
                del vars(owner)[name]
