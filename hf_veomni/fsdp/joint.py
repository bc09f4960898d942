"""Two sequences in one FSDP2 unit, and where a model begins to let another sequence run beside its own.

    plain    first: gather, layer, free     second: gather, layer, free
    joint    gather     first: layer | second: layer      free

FSDP2's hooks gather a unit's parameters before its forward, and reduce their gradients once those of its inputs are
there. With two sequences who enters first gathers, and who leaves last frees them; in the backward the gradients are
reduced when those of both have come. Half the gathers and reductions, and no sequence waits at the end of a layer for
the other one: it goes on into the next layer, while what the other one waits for is under way.

    first     layer i ...... |      layer i + 1 |
    second    ...... layer i | launch           | land, layer i + 1

It gets no further ahead than that: where the other one has not entered yet, who leaves a unit parks. Everything else
that hooks a unit runs for each sequence.

Sequences run side by side within the backbone. Outside of it (encoders, head, loss) each runs through alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.context import current, enter, leave
from hf_veomni.errors import UnsupportedError
from hf_veomni.hf import peft as hf_peft
from hf_veomni.mesh import ParallelState
from hf_veomni.pairs import Lane, check_greenlet

_REGISTER = "_register_post_backward_hook"


def _register_alone(stock: Callable[..., Any], args: object, kwargs: object) -> tuple[Any, Any]:
    """FSDP2's, which reduces after one sequence; of two `_Reduction` takes care."""
    return (args, kwargs) if current().lane is not None else stock(args, kwargs)


class _Gate:
    """A hook that is left out where one of two sequences runs, for which `_JointCall` calls it."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: object) -> Any:
        return None if current().lane is not None else self.hook(*args)


class _Reduction:
    """When the gradients of a unit are reduced: once those of all its sequences' inputs have come."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups, self.sequences, self.came = groups, 0, 0

    def await_gradients(self, inputs: object) -> Any:
        """The same inputs of one sequence, whose gradients are waited for."""
        leaves, structure = tree_flatten(inputs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (places and torch.is_grad_enabled()):
            return inputs  # FSDP2 reduces at the end of the backward
        self.sequences += 1
        for place, tensor in zip(places, _Await.apply(self, *(leaves[i] for i in places)), strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, structure)

    def come(self) -> None:
        self.came += 1
        if self.came % self.sequences == 0:  # again, where a graph is kept for a second backward
            for group in reversed(self.groups):
                group.post_backward()


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reduction: _Reduction, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.reduction = reduction
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.reduction.come()
        return None, *grads


class _Passage:
    """Of two sequences through one unit."""

    def __init__(self, lane: Lane, groups: Sequence[Any]) -> None:
        self.lanes, self.entered, self.left = (lane, lane.other), [lane], 0
        self.reduction = _Reduction(groups)


class _Parameters:
    """Those of modules, which a forward puts others in place of (experts under EP: local tensors, while they compute).

    While the other sequence runs they are as this one has found them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules, self.found = modules, [dict(module._parameters) for module in modules]

    def take(self) -> list[dict[str, Any]]:
        now = [dict(module._parameters) for module in self.modules]
        self.put(self.found)
        return now

    def put(self, taken: list[dict[str, Any]]) -> None:
        for module, parameters in zip(self.modules, taken, strict=True):
            module._parameters.update(parameters)


class _JointCall:
    """In place of a unit's `_call_impl`: FSDP2's hooks around both of two sequences."""

    def __init__(self, unit: Any) -> None:
        self.unit, self.state = unit, _state(unit)
        self.before = self._gate(unit._forward_pre_hooks, self.state._pre_forward_hook_handle.id)
        self.after = self._gate(unit._forward_hooks, self.state._post_forward_hook_handle.id)
        self.groups = _groups(self.state)
        inner: list[Any] = [m for m in unit.modules() if isinstance(m, FSDPModule) and m is not unit]
        others = {module for each in inner for module in each.modules()}
        self.modules = [module for module in unit.modules() if module not in others]
        self.open: _Passage | None = None
        for group in self.groups:
            vars(group)[_REGISTER] = partial(_register_alone, getattr(group, _REGISTER))
        vars(unit)["_call_impl"] = self

    @staticmethod
    def _gate(hooks: dict[int, Any], handle: int) -> _Gate:
        hooks[handle] = gate = _Gate(hooks[handle])
        return gate

    def remove(self) -> None:
        vars(self.unit).pop("_call_impl", None)
        for group in self.groups:
            vars(group).pop(_REGISTER, None)
        for hooks in (self.unit._forward_pre_hooks, self.unit._forward_hooks):
            for handle, hook in hooks.items():
                if hook in (self.before, self.after):
                    hooks[handle] = hook.hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lane = current().lane
        if lane is None:
            return type(self.unit)._call_impl(self.unit, *args, **kwargs)
        passage, again = self._enter(lane), self.state._training_state == TrainingState.PRE_BACKWARD
        try:
            args, kwargs = self.before.hook(self.unit, args, kwargs)
            if not again:  # what is recomputed has the nodes of its first forward
                args, kwargs = passage.reduction.await_gradients((args, kwargs))
            output = self._run(lane, *args, **kwargs)
            return self._leave(lane, passage, output)
        except BaseException:
            self.open = None
            raise

    def _run(self, lane: Lane, *args: Any, **kwargs: Any) -> Any:
        replaced = [m for m in self.modules if any(isinstance(p, DTensor) for p in m._parameters.values())]
        parameters = [_Parameters(replaced)] if replaced else []
        lane.shared += parameters
        try:
            return type(self.unit)._call_impl(self.unit, *args, **kwargs)
        finally:
            for one in parameters:
                lane.shared.remove(one)

    def _enter(self, lane: Lane) -> _Passage:
        """The passage that the other sequence has begun, or a new one."""
        while self.open is not None and lane in self.open.entered and lane.park(self.open):
            pass  # a unit that is called again, while the other one is still in its call before
        passage = self.open
        if passage is None or lane not in passage.lanes or lane in passage.entered:
            self.open = passage = _Passage(lane, self.groups)
        else:
            passage.entered.append(lane)
            lane.release(passage)
        return passage

    def _leave(self, lane: Lane, passage: _Passage, output: object) -> Any:
        """`output` as FSDP2's hook hands it on; parameters are freed once nobody is to come or inside."""
        passage.left += 1
        if passage.left == 2 or not (len(passage.entered) == 2 or lane.other_runs):
            return self._close(lane, passage, output)
        if self.state._training_state != TrainingState.PRE_BACKWARD:
            output = self.state._register_pre_backward_hook(output)
        output = self._cast(output)
        if len(passage.entered) == 1 and not lane.park(passage) and len(passage.entered) == 1:
            self._close(lane, passage, ())  # the other one goes elsewhere
        return output

    def _close(self, lane: Lane, passage: _Passage, output: object) -> Any:
        if self.open is passage:
            self.open = None
        lane.release(passage)
        return self.after.hook(self.unit, (), output)

    def _cast(self, output: object) -> Any:
        dtype = self.state._mp_policy.output_dtype
        if dtype is None:
            return output
        return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, output)


class _Progress:
    """How far a forward has come through the units that each sequence calls by itself, the root among them.

    FSDP2 keeps it on the units. While the other sequence runs they are as before a forward, so that for them the two
    forwards come one after the other.
    """

    def __init__(self, states: Sequence[Any]) -> None:
        self.states = states

    def _places(self) -> Iterator[tuple[Any, str, Any]]:
        for state in self.states:
            yield state, "_training_state", TrainingState.IDLE
            yield state._state_ctx, "iter_forward_root", None
            for group in _groups(state):
                yield group, "_training_state", TrainingState.IDLE

    def take(self) -> tuple[list[Any], list[set[nn.Module]]]:
        values, waiting = [], [set(state._modules_to_run_forward) for state in self.states]
        for owner, name, idle in self._places():
            values.append(getattr(owner, name))
            setattr(owner, name, idle)
        for state in self.states:
            state._modules_to_run_forward.clear()  # hooks hold on to the set
        return values, waiting

    def put(self, taken: tuple[list[Any], list[set[nn.Module]]]) -> None:
        values, waiting = taken
        # Backwards: what several units share was taken with the first of them.
        for (owner, name, _), value in reversed(list(zip(self._places(), values, strict=True))):
            setattr(owner, name, value)
        for state, modules in zip(self.states, waiting, strict=True):
            state._modules_to_run_forward.clear()
            state._modules_to_run_forward.update(modules)


def _state(unit: Any) -> Any:
    return unit._get_fsdp_state()


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12, which refuses to name one of several
    if several is not None:
        return several
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


class _Switches(NamedTuple):
    """What a user may change between two forwards of a model, and with it for whoever runs in it."""

    training: bool
    inference_mode: bool
    adapters: frozenset[tuple[str, ...]]  # in use, by layer


class _Backbone:
    """Hooks around a backbone, within which a sequence gives way to another one."""

    def __init__(self, progress: _Progress, adapted: Sequence[nn.Module]) -> None:
        self.progress, self.adapted = progress, adapted

    def enter(self, module: nn.Module, args: object) -> None:
        flight = current().flight
        if flight is not None:
            if self.progress not in flight.shared:
                flight.shared.append(self.progress)
            now = flight.found[module] = self._switches(module)
            self._check(module, flight.other.found.get(module, now), now)
        enter(self, lane=flight)

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        leave(self)
        flight = current().flight
        if flight is not None and (before := flight.found.pop(module, None)) is not None and output is not None:
            self._check(module, before, self._switches(module))

    def _switches(self, module: nn.Module) -> _Switches:
        return _Switches(module.training, torch.is_inference_mode_enabled(), hf_peft.adapters_in_use(self.adapted))

    @staticmethod
    def _check(module: nn.Module, before: _Switches, now: _Switches) -> None:
        """The other sequence is in the middle of its layers, which have these switches in common."""
        if before != now:
            raise UnsupportedError(
                f"{type(module).__name__.removeprefix('FSDP')} was switched from {before} to {now} while another "
                "sequence runs in it, which `overlap` ('pairs') cannot keep apart: call a reference model of its own, "
                "under torch.no_grad(), or leave `overlap` out of the plan."
            )


def attach_pairs(model: PreTrainedModel, undo: list[Callable[[], Any]]) -> None:
    """Let two sequences run side by side in a sharded model: each unit in its backbone gathers once for both.

    Args:
        undo: gets how to take it off again.
    """
    decoder = hf.find_backbone(model)
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    inside = set(decoder.modules()) - {decoder, model}
    # Of a unit of several modules (norm and head), which lie apart, each sequence runs all in turn.
    joint = [unit for unit in units if unit in inside and len(_state(unit)._modules) == 1]
    alone = dict.fromkeys(_state(unit) for unit in units if unit not in joint)
    adapted = [module for module in model.modules() if hf_peft.is_adapter(module)]
    around = _Backbone(_Progress(list(alone)), adapted)
    undo += [
        decoder.register_forward_pre_hook(around.enter).remove,
        decoder.register_forward_hook(around.leave, always_call=True, prepend=True).remove,  # last in, first out
    ]
    undo += [_JointCall(unit).remove for unit in joint]


def check_overlap(model: nn.Module, state: ParallelState) -> None:
    """Raise where two sequences in flight would be without effect, or cannot be. No collectives.

    Raises:
        ValueError: there is one rank, so nothing is exchanged or gathered.
        UnsupportedError: a rule by module beside it; a compiled module; the package greenlet is missing.
    """
    if state.plan.overlap != "pairs":
        return
    if state.world_size == 1:
        raise ValueError("`overlap` ('pairs') has no effect on one rank, where nothing is exchanged: leave it out.")
    ruled = [(pattern, rules["overlap"]) for pattern, rules in state.plan.modules.items() if "overlap" in rules]
    if ruled:
        raise UnsupportedError(
            f"The rule `overlap` ({ruled[0][1]!r}) for {ruled[0][0]!r} cannot be combined with `overlap` ('pairs'), "
            "where two sequences run through the full model: leave one of the two out."
        )
    # What is compiled so calls a module past `_JointCall`.
    compiled = next((name for name, module in model.named_modules() if module._compiled_call_impl is not None), None)
    if compiled is not None:
        raise UnsupportedError(
            f"`overlap` ('pairs') cannot be combined with '{compiled or type(model).__name__}', which is compiled: "
            "leave `compile` out, or `overlap` out of the plan."
        )
    check_greenlet()
