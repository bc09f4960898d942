"""One stage of a model whose own forward goes on running: what other stages own lets its input pass.

    encoders       of the first stage, on others: never called, since calls of these leave out what encoders read
    embeddings     of the first stage, on others: zeros of their output's shape, which hold no memory
    layer          of an earlier stage: passes its input; the last of them gives what the stage before has sent
    layer          of a later stage: passes its input; the first of them takes what goes to the stage after
                   (with several stages on a rank these change places before each forward: `Chunks`)
    norm, head     of the last stage, on others: pass their input

So masks, positions and rotary tables are made on every stage, at full length, by the model's own code, and layers are
called as ever, by their index and with their names: `model.layers.5` is the same layer on whatever stage it is. The
modules that were replaced live on outside of the model, without memory, where their attributes can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_torch_version
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_veomni.context import current
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ENCODERS, NAMES, ParallelState
from hf_veomni.pipeline.chain import Chain, find_chain
from hf_veomni.pipeline.microbatch import MicroBatch
from hf_veomni.pipeline.split import split_model

CHUNKS = "_omni_chunks"  # of a base model of which a rank has several stages: its `Chunks`


class PassThrough(nn.Module):
    """In place of a layer, norm or head of another stage: returns its first argument.

    Attributes of the module in whose place it stands (`layer_type`, the dtype of a head's `weight`) can be read.
    """

    def __init__(self, foreign: nn.Module, gives_tuple: bool = False) -> None:
        super().__init__()
        vars(self)["_foreign"] = foreign  # past nn.Module, of which it is to be no part
        self.gives_tuple = gives_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_foreign" not in vars(self):
                raise
            return getattr(vars(self)["_foreign"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.handle(args[0] if args else next(iter(kwargs.values())))
        return (hidden,) if self.gives_tuple else hidden

    def handle(self, hidden: Tensor) -> Tensor:
        return hidden


def _running() -> MicroBatch:
    found: MicroBatch | None = current().stage
    if found is None:
        raise UnsupportedError(
            "The backbone of a pipeline stage was called by itself, or after `detach_omni`: this rank holds some of "
            "its layers alone. Call the model, or load it again."
        )
    return found


class Absent(PassThrough):
    """In place of an encoder of the first stage. Raises UnsupportedError when it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(vars(self)["_foreign"]).__name__
        raise UnsupportedError(
            f"{kind} belongs to the first stage of a pipeline, and this is another one: hand what it reads to "
            "`run_window`, or to a call of the whole model."
        )


class Receive(PassThrough):
    """The last layer of the stage before: gives its output [B, s, C]. Blocks until that is there."""

    def handle(self, hidden: Tensor) -> Tensor:
        return _running().receive(hidden)


class Send(PassThrough):
    """The first layer of the stage after: its input [B, s, C] is sent once the forward is through."""

    def handle(self, hidden: Tensor) -> Tensor:
        _running().keep(hidden)
        return hidden.detach()


class Placeholder(PassThrough):
    """In place of embeddings of the first stage: ids [B, S] to zeros [B, S, C]."""

    def __init__(self, foreign: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(foreign)
        self.dtype = dtype

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width: int = self.embedding_dim
        return torch.zeros((), dtype=self.dtype, device=ids.device).expand(*ids.shape, width)


@dataclass(frozen=True)
class Stages:
    """How a model is cut.

    Attributes:
        chain: where.
        ranges: the layers of each stage.
        tied: names of each parameter that embeddings (first stage) and head (last stage) share.
    """

    chain: Chain
    ranges: list[range]
    tied: tuple[tuple[str, ...], ...]


def plan_stages(model: Any, state: ParallelState) -> Stages:
    """Find out how `cut_model` will cut a model. No collectives.

    Raises:
        UnsupportedError: it cannot be cut, or not under this plan.
    """
    if state.plan.modules:
        raise UnsupportedError(
            f"`modules` ({dict(state.plan.modules)}) cannot be combined with `pp_size` ({state.plan.pp_size}): each "
            "stage holds some of the modules alone, and rules are for all of them. Leave the rules out."
        )
    if state.plan.pp_stages > 1 and not is_torch_version(">=", "2.13"):
        raise UnsupportedError(
            f"`pp_stages` ({state.plan.pp_stages}) needs torch 2.13, and this is {torch.__version__}: 2.11 crashes in "
            "the backward of several stages of a rank. Leave it at 1."
        )
    chain, plan = find_chain(model), state.plan
    ranges = split_model(model, chain, plan.pp_size * plan.pp_stages, plan.pp_layers, plan.pp_stages)
    owners = _owners(chain, ranges)
    _check_trained(model, owners, state)
    return Stages(chain, ranges, _find_tied(model, chain, owners))


def _owners(chain: Chain, ranges: list[range]) -> list[tuple[int, nn.Module]]:
    """The modules with parameters, each with the number of its stage."""
    owners: list[tuple[int, nn.Module]] = [(0, getattr(chain.owner, name)) for name in chain.before]
    owners += [(0, getattr(parent, name)) for parent, name in chain.encoders]
    owners += [(stage, chain.layers[i]) for stage, own in enumerate(ranges) for i in own]
    return owners + [(len(ranges) - 1, getattr(parent, name)) for parent, name in chain.after]


def _check_trained(model: nn.Module, owners: list[tuple[int, nn.Module]], state: ParallelState) -> None:
    """Refuse ranks that would train nothing beside others that do: they have no optimizer and no gradient norm."""
    size = state.plan.pp_size
    trained = {stage % size for stage, module in owners if any(p.requires_grad for p in module.parameters())}
    if idle := sorted(set(range(size)) - trained) if trained else []:
        raise UnsupportedError(
            f"`pp_size` ({size}) leaves nothing to train on pipeline rank{'s' if len(idle) > 1 else ''} "
            f"{', '.join(map(str, idle))}: all parameters of {type(model).__name__} are frozen there, and each rank's "
            "optimizer needs some. Train parameters or adapters in layers of each stage, move trained layers with "
            "`pp_layers`, or use pp_size=1."
        )


def _find_tied(model: nn.Module, chain: Chain, owners: list[tuple[int, nn.Module]]) -> tuple[tuple[str, ...], ...]:
    """Parameters that modules of two stages share. Raises UnsupportedError where these are no embeddings and head."""
    layers = {p for layer in chain.layers for p in layer.parameters()}
    stages: dict[nn.Parameter, set[int]] = {}
    for stage, module in owners:
        for parameter in module.parameters():
            stages.setdefault(parameter, set()).add(stage)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    tied = []
    for parameter, called in names.items():
        found = sorted(stages[parameter])
        if len(found) > 1:
            if len(found) > 2 or parameter in layers:
                raise UnsupportedError(
                    f"'{called[0]}' of {type(model).__name__} is shared by layers of the stages {found}, and a "
                    "pipeline shares embeddings and head alone: use `pp_size=1`."
                )
            tied.append(tuple(called))
    return tuple(tied)


def _drop(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with zeros that hold no memory in place of its parameters and buffers, some of which others share.

    Not on the meta device: models send their ids to that of a weight.
    """
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty: Any = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
                    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
                    tensors[name] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
    return module


Places = dict[tuple[nn.Module, str], nn.Module]  # (parent, name) -> what stands there


def _places(stages: Stages, number: int, dtype: torch.dtype | None) -> Places:
    """What stands in for the modules that stage `number` does not own."""
    chain, own, found = stages.chain, stages.ranges[number], Places()
    if number:
        for name in chain.before:
            module = getattr(chain.owner, name)
            kind = next(iter(module.parameters())).dtype if dtype is None else dtype
            found[chain.owner, name] = Placeholder(module, kind)
        for parent, name in chain.encoders:
            found[parent, name] = Absent(getattr(parent, name))
    kinds = {own.start - 1: Receive, own.stop: Send}
    for index, layer in enumerate(chain.layers):
        if index not in own:
            found[chain.layers, str(index)] = kinds.get(index, PassThrough)(layer, chain.gives_tuple)
    if number < len(stages.ranges) - 1:
        for parent, name in chain.after:
            found[parent, name] = PassThrough(getattr(parent, name))
    return found


class Chunks:
    """Of a rank with several stages: which modules stand where while one of them runs. Between forwards all of the
    rank's modules are in their places, where optimizers, FSDP2 and checkpoints find them.

    Args:
        base: the model.
        places: of each stage.
    """

    def __init__(self, base: nn.Module, places: list[Places]) -> None:
        self.base, self._places = base, places
        self._own = {(parent, name): getattr(parent, name) for found in places for parent, name in found}

    @contextmanager
    def running(self, chunk: int) -> Iterator[None]:
        if isinstance(self.base, FSDPModule):
            self.base._get_fsdp_state()._lazy_init()  # which looks for the units, at the first forward otherwise
        self._put({**self._own, **self._places[chunk]})
        try:
            yield
        finally:
            self._put(self._own)

    @staticmethod
    def _put(places: Places) -> None:
        for (parent, name), module in places.items():
            setattr(parent, name, module)


def cut_model(stages: Stages, base: nn.Module, state: ParallelState, dtype: torch.dtype | None) -> None:
    """Keep what this rank's stages own, and let the rest pass its input. The rest's memory is freed.

    Args:
        dtype: of what embeddings return, where FSDP2's mixed precision casts them; None takes that of their weight.
    """
    plan = state.plan
    setattr(base, NAMES, tuple(name for name, _ in base.named_parameters(remove_duplicate=False)))
    found = [_places(stages, chunk * plan.pp_size + state.pp_rank, dtype) for chunk in range(plan.pp_stages)]
    foreign = [place for place in found[0] if all(place in places for places in found)]
    for parent, name in foreign:
        _drop(getattr(parent, name), state.device)
    Chunks._put({place: found[0][place] for place in foreign})
    if not state.pp_rank:
        setattr(base, ENCODERS, tuple(getattr(parent, name) for parent, name in stages.chain.encoders))
    if plan.pp_stages > 1:
        setattr(base, CHUNKS, Chunks(base, found))
