"""Two sequences in one call of an FSDP2 unit, and where a model begins to let another sequence run beside its own.

    plain    first: gather, layer, free     second: gather, layer, free
    joint    gather     first: layer | second: layer      free

FSDP2's hooks gather a unit's parameters before its forward, and reduce their gradients once those of its inputs are
there. With one call for both, who comes second makes it: half the gathers, and one reduction, when all is there.
Everything else that hooks a unit runs for each sequence.

Sequences run side by side within the backbone. Outside of it (encoders, head, loss) each runs through alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from transformers import PreTrainedModel

from hf_veomni import hf
from hf_veomni.context import current, enter, leave
from hf_veomni.errors import UnsupportedError
from hf_veomni.mesh import ParallelState
from hf_veomni.pairs import Visit, check_greenlet, run_both


class _Gate:
    """A hook that can be left out of a call."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.closed = hook, False

    def __call__(self, *args: Any) -> Any:
        return None if self.closed else self.hook(*args)


class _JointCall:
    """In place of a unit's `_call_impl`: one call of FSDP2's hooks for two sequences."""

    def __init__(self, unit: Any) -> None:
        self.unit, state = unit, _state(unit)
        self.before = self._gate(unit._forward_pre_hooks, state._pre_forward_hook_handle.id)
        self.after = self._gate(unit._forward_hooks, state._post_forward_hook_handle.id)
        vars(unit)["_call_impl"] = self

    @staticmethod
    def _gate(hooks: dict[int, Any], handle: int) -> _Gate:
        hooks[handle] = gate = _Gate(hooks[handle])
        return gate

    def remove(self) -> None:
        vars(self.unit).pop("_call_impl", None)
        for hooks in (self.unit._forward_pre_hooks, self.unit._forward_hooks):
            for handle, hook in hooks.items():
                if hook in (self.before, self.after):
                    hooks[handle] = hook.hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lane = current().lane
        if lane is None:
            return self._stock(*args, **kwargs)
        return lane.meet(self, Visit(args, kwargs), self._together, self._stock)

    def _stock(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.unit)._call_impl(self.unit, *args, **kwargs)

    def _together(self, *visits: Visit) -> tuple[Any, Any]:
        given, _ = self.before.hook(self.unit, tuple((visit.args, visit.kwargs) for visit in visits), {})
        calls = [partial(self._stock, *args, **kwargs) for args, kwargs in given]
        for visit in visits:
            visit.args, visit.kwargs = (), {}
        del given
        self.before.closed = self.after.closed = True
        try:
            found = run_both((calls[0], calls[1]), visits)
        finally:
            self.before.closed = self.after.closed = False
        return self.after.hook(self.unit, (), found)


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


class _Backbone:
    """Hooks around a backbone, within which a sequence gives way to another one."""

    def __init__(self, progress: _Progress) -> None:
        self.progress = progress

    def enter(self, module: nn.Module, args: Any) -> None:
        flight = current().flight
        if flight is not None and self.progress not in flight.shared:
            flight.shared.append(self.progress)
        enter(self, lane=flight)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        leave(self)


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
    around = _Backbone(_Progress(list(alone)))
    undo += [
        decoder.register_forward_pre_hook(around.enter).remove,
        decoder.register_forward_hook(around.leave, always_call=True, prepend=True).remove,  # last in, first out
    ]
    undo += [_JointCall(unit).remove for unit in joint]


def check_overlap(state: ParallelState) -> None:
    """Raise where two sequences in flight would be without effect, or cannot be. No collectives.

    Raises:
        ValueError: there is one rank, so nothing is exchanged or gathered.
        UnsupportedError: a rule by module beside it; the package greenlet is missing.
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
    check_greenlet()
